"""capsem-mcp: Capsem for AI clients, over the Model Context Protocol on standard input and output."""
