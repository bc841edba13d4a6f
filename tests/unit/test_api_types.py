"""Decoding requests and encoding answers."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capsem.api.codec import decode, encode
from capsem.api.exec_types import ExecRequest, ExecResponse, RunRequest
from capsem.api.file_types import CONTENT_LIMIT, WriteFileRequest
from capsem.api.vm_types import ProvisionRequest, SandboxInfo
from capsem.model.errors import InvalidInput, PayloadTooLarge
from capsem.model.ids import check_name
from capsem.model.lifecycle import Status
from capsem.model.spec import DEFAULT_DISK_MB


def test_defaults_of_provision() -> None:
    request = decode(ProvisionRequest, b"")
    assert request == ProvisionRequest()
    assert (request.name, request.ram_mb, request.cpus, request.source) == (None, None, None, None)
    assert request.disk_mb == DEFAULT_DISK_MB == 16384
    assert not request.persistent


def test_from_and_image_are_one_thing() -> None:
    assert decode(ProvisionRequest, b'{"from":"a"}').source == "a"
    assert decode(ProvisionRequest, b'{"image":"a"}').source == "a"
    assert decode(ProvisionRequest, b'{"image":"a","from":"a"}').source == "a"
    with pytest.raises(InvalidInput, match="different"):
        decode(ProvisionRequest, b'{"image":"a","from":"b"}')


def test_a_copy_has_the_profile_of_its_source() -> None:
    assert decode(ProvisionRequest, b'{"profile":"code"}').profile == "code"
    with pytest.raises(InvalidInput, match="profile of its source"):
        decode(ProvisionRequest, b'{"profile":"code","from":"a"}')
    for request, body in (
        (ProvisionRequest, b'{"profile":"../x"}'),
        (RunRequest, b'{"command":"","profile":"/"}'),
    ):
        with pytest.raises(InvalidInput, match="bad name"):
            decode(request, body)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('{"ram_mb":"4096"}', "ram_mb: expected"),
        ('{"ram_mb":1.5}', "ram_mb: expected"),
        ('{"disk_mb":null}', "disk_mb: expected"),
        ('{"persistent":1}', "persistent: expected"),
        ('{"env":{"A":1}}', "env"),
        ('{"env":[]}', "env: expected"),
        ('{"name":"-x"}', "bad name '-x'"),
        ("[]", "the body: expected"),
        ('"x"', "the body: expected"),
        ("nul", "no JSON"),
    ],
)
def test_wrong_types_are_told_by_field(body: str, says: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode(ProvisionRequest, body.encode())
    assert says in caught.value.message


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InvalidInput, match="missing required field `command`"):
        decode(ExecRequest, b"{}")


def test_what_more_an_exec_may_ask_for() -> None:
    request = decode(ExecRequest, b'{"command":"a","timeout_secs":5,"env":{"A":"b"},"cwd":"/tmp","job":"j1"}')
    assert (request.env, request.cwd, request.job, repr(request.timeout_secs)) == ({"A": "b"}, "/tmp", "j1", "5")
    for bad in ('"env":{"LD_PRELOAD":"x"}', '"env":{"A=":"x"}', '"job":"../x"', '"cwd":"a\\u0000"'):
        with pytest.raises(InvalidInput):
            decode(ExecRequest, f'{{"command":"a",{bad}}}'.encode())


@pytest.mark.parametrize("seconds", ["0", "-1", "1e12", "NaN", "true", '"5"'])
def test_senseless_timeouts(seconds: str) -> None:
    with pytest.raises(InvalidInput):
        decode(ExecRequest, f'{{"command":"a","timeout_secs":{seconds}}}'.encode())


def test_the_limit_of_content_is_in_bytes() -> None:
    limit = CONTENT_LIMIT
    WriteFileRequest(path="a", content="x" * limit)
    with pytest.raises(PayloadTooLarge):
        WriteFileRequest(path="a", content="é" * (limit // 2 + 1))


def test_absent_keys_are_left_out_and_required_ones_never() -> None:
    info = SandboxInfo(id="box", pid=0, status=Status.DEFUNCT, persistent=False)
    assert json.loads(encode(info)) == {"id": "box", "pid": 0, "status": "Defunct", "persistent": False}
    answer = ExecResponse(stdout="", stderr="", exit_code=0)
    assert json.loads(encode(answer)) == {"stdout": "", "stderr": "", "exit_code": 0}
    cut = ExecResponse(stdout="", stderr="", exit_code=0, truncated=True, job="7")
    assert json.loads(encode(cut)) == {"stdout": "", "stderr": "", "exit_code": 0, "truncated": True, "job": "7"}


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_invalid_input(body: bytes) -> None:
    for kind in (ProvisionRequest, ExecRequest, WriteFileRequest):
        try:
            decode(kind, body)
        except InvalidInput:
            continue


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from("name ram_mb cpus disk_mb persistent env from image x".split()), json_values))
def test_any_object_is_a_request_or_invalid_input(body: dict[str, object]) -> None:
    with contextlib.suppress(InvalidInput):
        decode(ProvisionRequest, json.dumps(body).encode())


@given(st.text(max_size=70) | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,70}", fullmatch=True))
def test_names_in_requests_are_checked_by_the_one_rule(name: str) -> None:
    body = json.dumps({"name": name}).encode()
    try:
        check_name(name)
    except InvalidInput:
        with pytest.raises(InvalidInput):
            decode(ProvisionRequest, body)
    else:
        assert decode(ProvisionRequest, body).name == name
