# The same checks as .ci/run, in the environment that is active.
.PHONY: check lint format types test

check: lint types test

lint:
	ruff check .
	ruff format --check .
	codespell --toml pyproject.toml

format:
	ruff check --fix .
	ruff format .

types:
	mypy

test:
	python -m pytest -n 2
