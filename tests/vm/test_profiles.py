"""What is in the image of profile `code`, seen from inside."""

from __future__ import annotations

import os

import pytest

from capsem.image.catalog import Catalog
from capsem.model.errors import NotFound
from real_service import SMALL, Service


def test_code_has_what_writes_and_runs_code(service: Service) -> None:
    try:
        Catalog.from_environment(os.environ).find("code")
    except NotFound as missing:  # it takes minutes and 450 MB to make, so it is not made for this alone
        pytest.skip(f"{missing.message}; {missing.hint}")
    command = r"""
        set -e
        for tool in gcc g++ make node npm pip pipx jq rg fdfind git ssh rsync sqlite3 strace tmux; do command -v $tool; done >&2
        echo 'int main() { return 6 * 7; }' > /tmp/a.c
        gcc -o /tmp/a /tmp/a.c
        /tmp/a || echo $?
        printf '#include <iostream>\nint main() { std::cout << 6 * 7 << std::endl; }\n' > /tmp/b.cc
        printf 'b: b.cc\n\tg++ -o b b.cc\n' > /tmp/Makefile
        make -s -C /tmp b
        /tmp/b
        node -e 'console.log(6 * 7)'
        python3 -m venv --without-pip /tmp/v
        /tmp/v/bin/python -c 'print(6 * 7)'

        python3 -c 'import zipfile
with zipfile.ZipFile("/tmp/answer-1-py3-none-any.whl", "w") as wheel:
    wheel.writestr("answer.py", "print(6 * 7)")
    wheel.writestr("answer-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: answer\nVersion: 1\n")
    wheel.writestr("answer-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    wheel.writestr("answer-1.dist-info/RECORD", "")'
        pip --python /tmp/v/bin/python install --quiet --no-index /tmp/answer-1-py3-none-any.whl >&2
        /tmp/v/bin/python -m answer

        mkdir /tmp/package && cd /tmp/package
        echo '{"name": "answer", "version": "1.0.0"}' > package.json
        echo 'console.log(6 * 7)' > index.js
        npm install --silent --offline --prefix /tmp/n /tmp/package >&2
        cd /tmp/n && node -e 'require("answer")'
    """
    answer = service.client.call("run", body={"command": command, "profile": "code", **SMALL})
    assert (answer["stdout"], answer["exit_code"]) == ("42\n" * 6, 0), answer
