"""What travels between clients and the service about files in VMs; the rules are those of `types`."""

from __future__ import annotations

from typing import Annotated

import msgspec

from capsem.api.types import Body
from capsem.model.errors import PayloadTooLarge

CONTENT_LIMIT = 512 * 1024  # bytes of text in one file call


class WriteFileRequest(Body, frozen=True):
    """Replace the content of a text file in the guest."""

    path: str
    content: str

    def __post_init__(self) -> None:
        # Counting the bytes needs a second copy; the number of characters often settles it.
        if len(self.content) > CONTENT_LIMIT or len(self.content.encode()) > CONTENT_LIMIT:
            raise PayloadTooLarge(
                "content: too long for one call", hint=f"at most {CONTENT_LIMIT >> 10} KiB; send it in parts"
            )


class ReadFileRequest(Body, frozen=True):
    """Read a text file in the guest."""

    path: str


class ListFilesQuery(Body, frozen=True):
    """Which directory of the workspace, and how many levels of it; more than 6 count as 6.

    `exact`, here and of files: the path is meant as it is; else characters outside of `A-Za-z0-9._/-` are dropped from it.
    """

    path: str = ""
    depth: Annotated[int, msgspec.Meta(ge=1)] = 1
    exact: bool = False


class GetFileQuery(Body, frozen=True):
    """Which file of the workspace; `whole`: without the limit of 10 MiB."""

    path: str
    whole: bool = False
    exact: bool = False


class PutFileQuery(Body, frozen=True):
    """Which file of the workspace, and its mode, three octal digits."""

    path: str
    mode: Annotated[str, msgspec.Meta(pattern=r"^[0-7]{3}\Z")] = "644"
    exact: bool = False


class ReadFileResponse(Body, frozen=True):
    """The text of a file."""

    content: str


class FileEntry(Body, frozen=True):
    """A file or directory of the workspace; `path` is relative to that. Only directories have `children`, as deep as
    was asked for.
    """

    name: str
    path: str
    type: str
    size: int
    mtime: int
    mime: str | None = None
    is_text: bool | None = None
    children: list[FileEntry] | None = None


class FilesResponse(Body, frozen=True):
    """What is in a directory. `truncated`: there was more than is listed."""

    entries: list[FileEntry]
    truncated: bool = False


class FileContent(Body, frozen=True):
    """Not JSON: the answer is the file's bytes."""


class FileWrittenResponse(Body, frozen=True):
    """The file is durable in the guest's file system."""

    success: bool
    size: int
