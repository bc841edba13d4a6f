"""Environment variables of commands in a guest that host and guest must agree about: some that may not be set, which both
refuse, and some that tell programs whose certificates to trust."""

# Names that change how a shell or the dynamic loader behaves before the command's first instruction.
BLOCKED_ENV = frozenset(
    "LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT LD_BIND_NOT LD_DEBUG LD_DYNAMIC_WEAK LD_PROFILE LD_SHOW_AUXV LD_USE_LOAD_BIAS "
    "IFS BASH_ENV ENV CDPATH GLOBIGNORE SHELLOPTS BASHOPTS PROMPT_COMMAND PS4".split()
)

BUNDLE = "/etc/ssl/certs/ca-certificates.crt"  # all authorities, ours among them (guest/trust.py)
AUTHORITY = "/usr/local/share/ca-certificates/capsem.crt"  # ours alone

# For programs that bring a list of authorities of their own: read the guest's. One that the VM's owner sets wins.
TRUST_ENV = {
    **dict.fromkeys(
        "SSL_CERT_FILE REQUESTS_CA_BUNDLE CURL_CA_BUNDLE PIP_CERT GIT_SSL_CAINFO AWS_CA_BUNDLE CARGO_HTTP_CAINFO".split(),
        BUNDLE,
    ),
    "NODE_EXTRA_CA_CERTS": AUTHORITY,  # beside Node's own, which it need not read twice
    "NODE_USE_SYSTEM_CA": "1",
    "DENO_TLS_CA_STORE": "system",
    "UV_SYSTEM_CERTS": "true",
    "UV_NATIVE_TLS": "true",  # its older name
}


def env_problem(name: str, value: str) -> str | None:
    """Why `name=value` cannot be set in a guest, or None."""
    if not name or "=" in name or "\0" in name:
        return 'a variable\'s name is not empty and has no "=" or NUL'
    if name in BLOCKED_ENV:
        return f"{name} is blocked: it would change how the shell or the loader runs"
    if "\0" in value:
        return f"the value of {name} contains NUL"
    return None
