# Every target prepares its own virtual environment in .venv; what needs other frameworks one in .venv-integrations, and
# the documentation one in .venv-docs.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: demo tasks test test-slow test-integrations lint report report-quick bench bench-quick bench-dry bench-results bench-integrations crossover gallery pictures docs docs-check clean

.venv/ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[examples,test,bench,lint]'
	touch $@

# speechbrain imports torchaudio, whose extension loads only beside torch with CUDA, and which does without if it has none.
.venv-integrations/ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-integrations
	.venv-integrations/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[integrations,test]'
	.venv-integrations/bin/pip install --quiet --disable-pip-version-check --no-deps xlstm==2.0.6  # its sLSTM cell needs torch alone
	.venv-integrations/bin/python -c "import torchaudio" 2>/dev/null || rm .venv-integrations/lib/python*/site-packages/torchaudio/lib/_torchaudio*
	touch $@

.venv-docs/ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

demo: .venv/ready
	$(BIN)/python -m seqcells check
	$(BIN)/python -m seqcells run count-ones --cell lstm gru --full --plot out/count-ones.png

tasks: .venv/ready
	$(BIN)/python -m seqcells run --all --full --device cpu --save out/tasks --resume --json out/tasks.json --table benchmarks/results/tasks-cpu.md

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

test-integrations: .venv-integrations/ready
	.venv-integrations/bin/python -m pytest -n 2 -m integrations tests/integrations

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict --follow-imports=silent tests/typed_program.py
	$(BIN)/pyright --pythonpath $(BIN)/python tests/typed_program.py

report: .venv/ready
	@mkdir -p out
	$(BIN)/python -m seqcells.kernels.report --target all --json out/report.json
	$(BIN)/python benchmarks/static.py out/report.json benchmarks/results

report-quick: .venv/ready
	$(BIN)/python -m seqcells.kernels.report --target all --quick --spills

bench: .venv/ready
	$(BIN)/python benchmarks/compare.py --device cpu --minutes 3

bench-quick: .venv/ready
	$(BIN)/python -m pytest benchmarks --benchmark-only -m quick --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

bench-dry: .venv/ready
	$(BIN)/python benchmarks/gpu.py --out out/gpu --device cpu --dry

bench-results: .venv/ready
	$(BIN)/python benchmarks/compare.py --device cpu --scaling --minutes 8 --json benchmarks/results/cpu.json --table benchmarks/results/cpu.md
	$(MAKE) pictures

bench-integrations: .venv-integrations/ready
	.venv-integrations/bin/python benchmarks/recurrent_ppo.py --table benchmarks/results/integrations-cpu.md

crossover: .venv/ready
	$(BIN)/python benchmarks/crossover.py --table benchmarks/results/crossover-cpu.md

gallery: .venv/ready
	$(BIN)/python benchmarks/gallery.py --table benchmarks/results/gallery-cpu.md
	$(BIN)/python benchmarks/gallery.py --static sm_90 --table benchmarks/results/gallery-sm_90.md

pictures: .venv/ready
	$(BIN)/python benchmarks/plot.py benchmarks/results/cpu.json benchmarks/results --static benchmarks/results/static-sm_90.md

docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo out/docs/index.html

docs-check: docs
	.venv-docs/bin/python docs/check_pages.py out/docs

clean:
	rm -rf .venv .venv-docs .venv-integrations out build dist *.egg-info
