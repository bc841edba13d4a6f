.PHONY: test mutants soak lint demo docs man bench lock

test:
	./scripts/test

# Many boots, and nothing that they leave behind; figures on standard error. A million simulated operations.
soak:
	./scripts/test -n 2 -m soak -v tests/vm tests/simulation

# Tests of the tests: breaks a copy of the tree in one place at a time, and shows which test notices. Takes minutes.
mutants:
	.venv/bin/python tests/mutants.py

demo:
	./scripts/demo

lint:
	./scripts/lint

# $(call page,NAME,MODULE): a page that a module prints; it stays as it is when that fails.
page = .venv/bin/python -m $(2) > docs/.$(1).new && mv docs/.$(1).new docs/$(1).md || { rm -f docs/.$(1).new; exit 1; }

# Regenerates the pages that are made from tables, and builds the site of all pages in site/; a test fails when they are out of date.
docs:
	$(call page,sdk-reference,capsem.sdk.reference)
	$(call page,lifecycle,capsem.model.lifecycle)
	$(call page,cli,capsem.cli.reference)
	$(call page,http,capsem.api.reference)
	$(call page,mcp-tools,capsem.mcp.reference)
	$(call page,policy,capsem.egress.reference)
	.venv/bin/python -m bench.report
	.venv/bin/python -m mkdocs build --strict -q

# Manual pages, one for each command: MANPATH=build/share/man man capsem-exec
man:
	.venv/bin/python -m capsem.cli.man build/share/man/man1

# Ours beside QEMU alone and beside peers, in turn: bench/results, docs/benchmarks.md. Some 20 minutes.
bench:
	.venv/bin/python -m bench

# Pins every dependency with hashes. The files name no registry; the options see to that.
lock:
	.venv/bin/pip-compile -q --generate-hashes --allow-unsafe --strip-extras --no-emit-index-url --no-emit-find-links --no-header --no-annotate -o requirements/runtime.txt --extra build pyproject.toml
	.venv/bin/pip-compile -q --generate-hashes --allow-unsafe --strip-extras --no-emit-index-url --no-emit-find-links --no-header --no-annotate -o requirements/dev.txt --extra build --extra dev pyproject.toml
