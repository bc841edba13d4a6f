"""The Python SDK: `capsem.Sandbox` and `capsem.AsyncSandbox`, which are imported from `capsem` itself."""
