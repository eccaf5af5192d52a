# make demo    a whole run on the embedded model and data, from nothing
# make v1-v2   a run that overfits and one that does not, compared; make v1-v2-few adds one between them
# make tiny-model  the embedded model from nothing: texts, tokenizer, training, 4 bits; goes on where it was (50 minutes)
# make distill cross-entropy, a live teacher, a cached one and chains of thought on word problems, three seeds each
# make tiny-teacher  the embedded teacher: the tiny model with twice its layers, trained on word problems
# make test    the test suite, from nothing
# make flat    memory over 1,000 updates; `make test` makes 150
# make kills   kills and faults in a training, each gone on with and compared (15 minutes); `make test` does some of them
# make bench   the benchmarks, whose results are kept in benchmarks/results (about an hour)
# make check   formatting, lint, types, then the tests: what CI runs

PYTHON ?= python3
# Linux with an NVIDIA GPU: make demo EXTRA=cuda
EXTRA ?= cpu
VENV := .venv
BIN := $(VENV)/bin

# Two files of tests at a time; what computes in each is on one thread.
TESTS := MKL_NUM_THREADS=1 KMP_BLOCKTIME=0 $(BIN)/pytest --numprocesses 2 --dist loadfile

.PHONY: demo v1-v2 v1-v2-few distill tiny-model tiny-teacher test flat kills check format bench clean

demo: $(VENV)/installed
	$(BIN)/mlx-qlora train --demo --overwrite

# Both see 2,544 chats in all: V1 24 times the same 106, V2 three times 848. V2-few has V2's settings and V1's chats.
STORY := runs/v1-v2
EVALUATED := --split valid --max-answer-tokens 32 --no-base
v1-v2: $(VENV)/installed
	mkdir -p $(STORY)/few
	head -n 106 data/train.jsonl > $(STORY)/few/train.jsonl
	cp data/valid.jsonl $(STORY)/few/
	$(BIN)/mlx-qlora train --config examples/club-v1.yaml --overwrite
	$(BIN)/mlx-qlora train --config examples/club-v2.yaml --overwrite
	for run in v1 v2; do $(BIN)/mlx-qlora evaluate --run $(STORY)/$$run $(EVALUATED) || exit; done
	$(BIN)/mlx-qlora compare $(STORY)/v1 $(STORY)/v2 --output-dir $(STORY)/compared
	$(BIN)/mlx-qlora report $(STORY)/v1 $(STORY)/v2 --output $(STORY)/report.html

v1-v2-few: v1-v2
	$(BIN)/mlx-qlora train --config examples/club-v2.yaml --overwrite --data $(STORY)/few --epochs 24 --output-dir $(STORY)/v2-few
	$(BIN)/mlx-qlora evaluate --run $(STORY)/v2-few $(EVALUATED)
	$(BIN)/mlx-qlora compare $(STORY)/v1 $(STORY)/v2-few $(STORY)/v2 --output-dir $(STORY)/compared

# Four ways to learn from the same 256 word problems: labels alone, a teacher beside, its answers kept on the disk, and
# rationale and answer as two tasks. No sum of the test is among what student or teacher learnt from.
DISTILL := runs/distill
WAYS := ce live cached cascod
SEEDS := --seeds 42,123,456 --seeds-evaluate base=false
distill: $(VENV)/installed
	$(BIN)/python data/make_problems.py --easy --train 256 --test 250 --output-dir $(DISTILL)/data
	$(BIN)/mlx-qlora distill cache --config examples/distill-cached.yaml --distill.teacher embedded-teacher --overwrite
	for way in $(WAYS); do $(BIN)/mlx-qlora distill --config examples/distill-$$way.yaml --overwrite $(SEEDS) || exit; done
	$(BIN)/mlx-qlora compare $(WAYS:%=$(DISTILL)/%) --score final_number --output-dir $(DISTILL)/compared

TINY := runs/tiny-model
tiny-model: $(VENV)/installed
	$(BIN)/python data/make_world.py --output-dir $(TINY)-data
	$(BIN)/mlx-qlora train --config examples/tiny-model.yaml --resume
	rm -rf $(TINY)/4bit
	$(BIN)/mlx_lm.convert --hf-path $(TINY)/model --mlx-path $(TINY)/4bit --quantize --q-bits 4 --q-group-size 64 --dtype float16
	$(BIN)/mlx-qlora train --demo --overwrite --model $(TINY)/4bit --output-dir $(TINY)/demo-new
	$(BIN)/mlx-qlora train --demo --overwrite --output-dir $(TINY)/demo-embedded
	$(BIN)/python data/make_model.py $(TINY)

TEACHER := runs/tiny-teacher
tiny-teacher: $(VENV)/installed
	$(BIN)/python data/make_problems.py --output-dir $(TEACHER)-data --train 8000 --valid 100
	$(BIN)/python data/make_teacher.py grow $(TEACHER)-grown
	$(BIN)/mlx-qlora train --config examples/tiny-teacher.yaml --resume
	rm -rf $(TEACHER)/4bit
	$(BIN)/mlx_lm.convert --hf-path $(TEACHER)/model --mlx-path $(TEACHER)/4bit --quantize --q-bits 4 --q-group-size 64 --dtype float16
	for model in model 4bit; do $(BIN)/mlx-qlora evaluate --model $(TEACHER)/$$model --data $(TEACHER)-data --output-dir $(TEACHER)/$$model-evaluated --max-answer-tokens 48 || exit; done
	$(BIN)/python data/make_teacher.py finish $(TEACHER)

test: $(VENV)/installed-dev
	$(TESTS)

flat: $(VENV)/installed-dev
	MLX_QLORA_UPDATES=1000 $(BIN)/pytest tests/test_memory.py -k flat

kills: $(VENV)/installed-dev
	$(BIN)/python tests/kills.py

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(TESTS)

bench: $(VENV)/installed
	$(BIN)/python benchmarks/frozen_matmul.py
	$(BIN)/python benchmarks/prepare_million.py
	$(BIN)/python benchmarks/memory_7b.py
	$(BIN)/python benchmarks/kept_states.py
	$(BIN)/python benchmarks/recorder.py
	$(BIN)/python benchmarks/phases.py
	$(BIN)/python benchmarks/saving.py
	$(BIN)/python benchmarks/kept_logits.py
	$(BIN)/python benchmarks/distill_memory.py

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed; this is " + sys.version.split()[0] + ". Name one: make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[$(EXTRA),plots,scores]"
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[$(EXTRA),dev]"
	@touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
