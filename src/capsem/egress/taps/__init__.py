"""Telemetry of model APIs: what was asked of which model, with how many tokens, at what cost, and which tools it wanted.

    bytes as they pass -> coding (compression undone, bounded) -> sse or arrays (a stream's pieces) or the whole of an answer
                       -> anthropic, openai, gemini (what the pieces say) -> found -> prices -> a ModelCall for the record

A tap sees copies of chunks that have been sent already: it can delay nothing and change nothing. Everything it keeps is
bounded, for one call and for all calls of a VM together; what is beyond is not looked at, and the row says so. What the
bytes hold is a stranger's: whatever it is, a tap gets along with it.
"""
