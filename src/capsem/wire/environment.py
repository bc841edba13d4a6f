"""Environment variables that may not be set for a command in a guest; host and guest both refuse them."""

# Names that change how a shell or the dynamic loader behaves before the command's first instruction.
BLOCKED_ENV = frozenset(
    "LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT LD_BIND_NOT LD_DEBUG LD_DYNAMIC_WEAK LD_PROFILE LD_SHOW_AUXV LD_USE_LOAD_BIAS "
    "IFS BASH_ENV ENV CDPATH GLOBIGNORE SHELLOPTS BASHOPTS PROMPT_COMMAND PS4".split()
)


def env_problem(name: str, value: str) -> str | None:
    """Why `name=value` cannot be set in a guest, or None."""
    if not name or "=" in name or "\0" in name:
        return 'a variable\'s name is not empty and has no "=" or NUL'
    if name in BLOCKED_ENV:
        return f"{name} is blocked: it would change how the shell or the loader runs"
    if "\0" in value:
        return f"the value of {name} contains NUL"
    return None
