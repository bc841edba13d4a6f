"""What an image is made of, as a value, and the digest that says whether an image is still what its recipe makes.

The digest covers everything that decides the content of the image: the recipe itself, the code that goes into the
guest, and the modules of this package that put the image together. Versions of Debian packages are not part of it:
they are taken as they are when the base system is fetched, and recorded in the manifest.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import capsem
from capsem.model.errors import NotFound
from capsem.model.ids import check_name

FORMAT: Final = 1  # of the image directory and its manifest

ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}  # the kernel's name for it: Debian's

# The tools of interface.md 6.2, a complete Python, and what an agent would otherwise miss first.
_PACKAGES: Final = (
    "bash busybox-static ca-certificates coreutils curl debianutils e2fsprogs file gawk git hostname iproute2 iptables "
    "iputils-ping kmod less mount nftables procps python3 python3-venv unzip util-linux xz-utils"
).split()

# What an agent that writes code expects to find: compilers, the two languages it is most often asked for, each with what
# installs its packages, and the tools with which it looks around. Debian 13 has no `uv`; pipx can bring it.
_CODE_PACKAGES: Final = (
    "bc fd-find g++ gcc jq make nano nodejs npm openssh-client patch pipx pkg-config python3-dev python3-pip ripgrep rsync "
    "sqlite3 strace tmux tree zip"
).split()

DEFAULT_PROFILE: Final = "default"
PROFILES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {DEFAULT_PROFILE: tuple(_PACKAGES), "code": (*_PACKAGES, *_CODE_PACKAGES)}
)
"""What can be built, by name: the packages of each image. All else they have in common."""

# What the root file system needs: loaded by the initramfs. Modules that are built into the kernel are passed over.
_EARLY_MODULES: Final = "virtio_pci virtio_blk erofs ext4 overlay".split()

# Loaded in the background, then no module can be loaded any more. The network ones are the tested list of egress.md,
# section 2: capture of connections, rules by iptables-nft, and what `ss` asks for.
_LATE_MODULES: Final = (
    "virtio_rng vmgenid pvpanic_pci virtio_console fuse "
    "dummy nfnetlink nf_tables nf_defrag_ipv6 nf_defrag_ipv4 nf_conntrack nf_nat nft_chain_nat nft_redir nf_reject_ipv4 "
    "nf_reject_ipv6 nft_reject nft_reject_inet nft_ct "
    "x_tables nft_compat xt_REDIRECT xt_owner xt_tcpudp xt_addrtype "
    "nft_limit nft_log nf_log_syslog inet_diag tcp_diag"
).split()

# What the kernel is told, beside what the virtual hardware needs it to know (capsem.hypervisor). docs/images.md has the
# figures: under emulation the second half spares the kernel more than half of its instructions.
_COMMAND_LINE: Final = " ".join(
    (
        "ro quiet init_on_alloc=1 slab_nomerge page_alloc.shuffle=1",
        "lsm=landlock",  # of the security modules, the one that programs use for themselves
        "cryptomgr.notests",
        # Key ring for module signatures (we carry none), names of enums in trace formats, BPF's type tables (read when a
        # program first asks for them), a random generator's self-test.
        "initcall_blacklist=load_system_certificate_list,trace_eval_init,bpf_tcp_ca_kfunc_init,jent_mod_init",
    )
)

# The modules beside this one whose text decides what is in an image.
_MAKERS: Final = ("build.py", "initramfs.py", "kernel.py", "modules.py", "rootfs.py", "volume.py")


@dataclass(frozen=True, slots=True)
class Recipe:
    """All choices that make an image; `volume_mb` in MiB. Raises InvalidInput for a name that cannot be a file name."""

    name: str = DEFAULT_PROFILE
    suite: str = "trixie"
    architecture: str = "amd64"  # Debian's name
    variant: str = "apt"  # mmdebstrap's: the essential packages and apt
    packages: tuple[str, ...] = PROFILES[DEFAULT_PROFILE]
    kernel_package: str = "linux-image-cloud-amd64"
    early_modules: tuple[str, ...] = tuple(_EARLY_MODULES)
    late_modules: tuple[str, ...] = tuple(_LATE_MODULES)
    volume_mb: int = 16 * 1024
    kernel_command_line: str = _COMMAND_LINE
    format_version: int = FORMAT

    def __post_init__(self) -> None:
        check_name(self.name)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as the manifest holds it."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]  # tuples become lists, as when read

    def digest(self, files: Mapping[str, bytes] | None = None) -> str:
        """Digest over all inputs, in hexadecimal; `files` are the guest's, if the caller has read them already."""
        here = Path(__file__).parent
        inputs = {
            "recipe": self.to_dict(),
            "guest": {path: _sha256(data) for path, data in (files or guest_files()).items()},
            "makers": {name: _sha256((here / name).read_bytes()) for name in _MAKERS},
        }
        return _sha256(json.dumps(inputs, sort_keys=True).encode())

    def base_digest(self, mirror: str | None, procedure: str) -> str:
        """Digest over what decides the base system alone; `procedure` is what else is done to it."""
        inputs = [self.suite, self.architecture, self.variant, self.packages, self.kernel_package, mirror, procedure]
        return _sha256(json.dumps(inputs).encode())


def for_machine(machine: str, profile: str = DEFAULT_PROFILE) -> Recipe:
    """The recipe of a profile for a kind of machine as `platform.machine()` names it; an unknown one counts as x86_64.

    Raises NotFound for an unknown profile.
    """
    if profile not in PROFILES:
        raise NotFound(f"there is no profile {profile!r}", hint=f"there are: {', '.join(PROFILES)}")
    architecture = ARCHITECTURES.get(machine, "amd64")
    return Recipe(
        name=profile,
        packages=PROFILES[profile],
        architecture=architecture,
        kernel_package=f"linux-image-cloud-{architecture}",
    )


def for_this_machine(profile: str = DEFAULT_PROFILE) -> Recipe:
    """The recipe of a profile for the machine we run on. Raises NotFound for an unknown profile."""
    return for_machine(platform.machine(), profile)


def guest_files() -> dict[str, bytes]:
    """What of our own code goes into the guest, by path relative to /usr/lib/capsem.

    The agent is the package `capsem` with nothing but `wire` and `guest` in it; init scripts lie beside it.
    """
    package = Path(capsem.__file__).parent
    sources = [
        package / "__init__.py",
        *(file for part in ("wire", "guest") for file in (package / part).rglob("*.py")),
    ]
    files = {f"capsem/{source.relative_to(package).as_posix()}": source.read_bytes() for source in sorted(sources)}
    scripts = Path(__file__).parent / "guestfs"
    return files | {script.name: script.read_bytes() for script in sorted(scripts.iterdir()) if script.is_file()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
