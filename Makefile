.PHONY: test soak lint demo docs bench lock

test:
	./scripts/test

# Many boots, and nothing that they leave behind; figures on standard error.
soak:
	./scripts/test -m soak -s tests/vm

demo:
	./scripts/demo

lint:
	./scripts/lint

# Regenerates the pages that are made from tables; a test fails when they are out of date.
docs:
	.venv/bin/python -m capsem.model.lifecycle > docs/lifecycle.md
	.venv/bin/python -m capsem.cli.reference > docs/cli.md
	.venv/bin/python -m capsem.api.reference > docs/http.md

bench:
	.venv/bin/python -m bench

# Pins every dependency with hashes. The files name no registry; the options see to that.
lock:
	.venv/bin/pip-compile -q --generate-hashes --allow-unsafe --strip-extras --no-emit-index-url --no-emit-find-links --no-header --no-annotate -o requirements/runtime.txt --extra build pyproject.toml
	.venv/bin/pip-compile -q --generate-hashes --allow-unsafe --strip-extras --no-emit-index-url --no-emit-find-links --no-header --no-annotate -o requirements/dev.txt --extra build --extra dev pyproject.toml
