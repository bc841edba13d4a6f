"""The table of MCP tools: what the contract asks of it, that it fits the service's types, and what it costs a model."""

from __future__ import annotations

import json

import msgspec
import pytest

from capsem.api.operations import OPERATIONS
from capsem.mcp.record_tools import INSPECT_SCHEMA
from capsem.mcp.schema import input_schema, output_schema
from capsem.mcp.server import declaration
from capsem.mcp.tool import HERE, ID, Tool
from capsem.mcp.tools import TOOLS, TOOLSETS

# Names, parameters and which of them are required: what clients of the contract send.
CONTRACT = {
    "capsem_create": "name ramMb cpuCount version env from",
    "capsem_list": "",
    "capsem_info": "id*",
    "capsem_exec": "id* command* timeout",
    "capsem_run": "command* timeout env",
    "capsem_read_file": "id* path*",
    "capsem_write_file": "id* path* content*",
    "capsem_stop": "id*",
    "capsem_suspend": "id*",
    "capsem_delete": "id*",
    "capsem_resume": "name*",
    "capsem_persist": "id* name*",
    "capsem_purge": "all",
    "capsem_fork": "id* name* description",
    "capsem_vm_logs": "id* grep tail",
    "capsem_service_logs": "grep tail",
    "capsem_host_logs": "name* grep tail maxBytes",
    "capsem_panics": "since limit",
    "capsem_triage": "since limit id",
    "capsem_timeline": "id* traceId since limit layers",
    "capsem_inspect_schema": "",
    "capsem_inspect": "id* sql*",
    "capsem_version": "",
    "capsem_mcp_servers": "",
    "capsem_mcp_tools": "server",
    "capsem_mcp_call": "name* arguments",
}

# Bytes of JSON that a client puts into every conversation; four of them are about a token.
SIZES = {"core": 12_000, "all": 27_000}

each_tool = pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)


@pytest.mark.parametrize(("name", "words"), CONTRACT.items(), ids=CONTRACT)
def test_the_contract_s_parameters(name: str, words: str) -> None:
    schema = input_schema(TOOLS[name])
    assert set(words.replace("*", "").split()) <= schema["properties"].keys()
    assert schema.get("required", []) == [word[:-1] for word in words.split() if word.endswith("*")]


@each_tool
def test_a_tool_sends_what_its_operation_takes(tool: Tool) -> None:
    row = OPERATIONS[tool.operation]
    kind = row.request_type() or row.query_type()
    known = {field.encode_name for field in msgspec.structs.fields(kind)} if kind else set()
    sent = [param for param in tool.params if param.goes_to not in (ID, HERE)]
    if tool.name == "capsem_mcp_call":
        sent = []  # its arguments are the body
    if tool.name == "capsem_create":
        sent = [param for param in sent if param.name != "version"]  # of the contract, and ignored
    assert {param.goes_to for param in sent} <= known
    if tool.name != INSPECT_SCHEMA:  # which asks nobody
        assert [param.goes_to for param in tool.params].count(ID) == (row.takes_id or row.takes_name)


@each_tool
def test_a_tool_is_described(tool: Tool) -> None:
    shown = declaration(tool)
    assert len(shown.description or "") > 20
    assert shown.input_schema["type"] == "object"
    assert all("type" in each for each in shown.input_schema["properties"].values())
    schema = output_schema(tool)
    assert schema is None or schema["type"] == "object"
    assert "$ref" not in json.dumps(schema)


@pytest.mark.parametrize("toolset", TOOLSETS)
def test_a_toolset_stays_small(toolset: str) -> None:
    tools = [declaration(tool).model_dump(by_alias=True, exclude_none=True) for tool in TOOLSETS[toolset]]
    assert len(json.dumps(tools)) <= SIZES[toolset]


def test_the_core_is_a_dozen_at_most_and_enough_for_a_life() -> None:
    names = {tool.name for tool in TOOLSETS["core"]}
    assert len(names) <= 12
    assert {f"capsem_{verb}" for verb in "create list exec suspend resume fork delete".split()} <= names


def test_examples_in_descriptions_are_calls_that_would_be_taken() -> None:
    from capsem.mcp.translate import request

    shown = 0
    for tool in TOOLS.values():
        _, found, example = tool.says.partition("Example: ")
        if found:
            arguments = json.loads(example)
            assert set(arguments) <= {param.name for param in tool.params}
            call = request(tool, arguments)
            row = OPERATIONS[call.operation]
            kind = row.request_type() or row.query_type()
            assert kind is not None
            msgspec.convert(call.body or call.query, kind)
            shown += 1
    assert shown >= 8
