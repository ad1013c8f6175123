VENV   := $(CURDIR)/.venv
OK     := $(VENV)/.ok
STAMPS := $(or $(TOKSR_STAMPS),/usr/share/tuxpaint/stamps)
export PATH := $(VENV)/bin:$(PATH)
export JUPYTER_CONFIG_DIR := $(CURDIR)/.jupyter
export DVC_NO_ANALYTICS := 1
unexport PYTHONPATH JUPYTER_PATH VIRTUAL_ENV

# install Debian packages, as root or through sudo; fails where neither is possible
apt = command -v apt-get >/dev/null && { [ "$$(id -u)" = 0 ] || command -v sudo >/dev/null; } \
	&& AS=$$([ "$$(id -u)" = 0 ] || echo sudo) && $$AS apt-get update -qq \
	&& $$AS env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(1)

.DEFAULT_GOAL := help
.PHONY: help env data browser repro retrain test lab site sync hooks profile freeze clean

help:               ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/bin/python:
	@py=$$(command -v python3.11 || command -v python3 || true); \
	[ -n "$$py" ] && [ "$$($$py -c 'import sys; print(sys.version_info[:2])' 2>/dev/null)" = '(3, 11)' ] || \
		{ echo 'toksr needs Python 3.11, as python3.11 or python3 on the PATH (Debian: apt-get install python3.11 python3.11-venv)' >&2; exit 1; }; \
	$$py -c 'import ensurepip' 2>/dev/null || { $(call apt,python3.11-venv) ; } || \
		{ echo 'cannot make a virtual environment: apt-get install python3.11-venv' >&2; exit 1; }; \
	$$py -m venv $(VENV)

$(OK): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

env: $(OK)          ## the pinned environment in .venv

data: $(OK)         ## the photographs, from the distribution's package
	@has() { [ -n "$$(find -L '$(STAMPS)' -name '*.png' 2>/dev/null | head -n 1)" ]; }; \
	has || { [ -z "$(TOKSR_STAMPS)" ] && $(call apt,tuxpaint-stamps-default) && has; } || \
		{ echo 'no photographs in $(STAMPS): install the package tuxpaint-stamps-default, or set TOKSR_STAMPS to the folder of an existing copy' >&2; exit 1; }
	@grep -qxF '  path: $(STAMPS)' data.dvc || { dvc import-url -q --force '$(STAMPS)' data && dvc unfreeze -q data.dvc; }

repro: $(OK) data   ## rebuild every result whose inputs changed
	toksr-repro

retrain: $(OK) data ## rebuild everything from nothing, training included
	rm -rf .ckpt          # a finished run would only be continued at its end
	toksr-repro --force

browser:            ## Chromium and its driver, for the test that votes on a page
	@for p in chromium chromedriver; do command -v $$p >/dev/null && continue; \
	$(call apt,chromium chromium-driver) || { echo 'no browser: install the packages chromium and chromium-driver' >&2; exit 1; }; done

test: $(OK) data browser  ## the chapters' own tests, then the rest
	OMP_NUM_THREADS=1 nbdev-test nbs
	OMP_NUM_THREADS=1 pytest -q -n auto --dist loadfile

lab: $(OK)          ## JupyterLab that cleans notebooks on save
	jupyter lab

site: $(OK)         ## pages of the results in build/site
	toksr-site reports/notebooks build/site

sync: $(OK)         ## after editing a notebook elsewhere: clean, export, fingerprint
	jupyter nbconvert --log-level WARN --clear-output --inplace $$(find nbs -name '*.ipynb' -not -path '*checkpoints*')
	nbdev-clean
	nbdev-export
	dvc repro -q -s code

hooks: $(OK)        ## readable notebook diffs and merges in this clone
	git config --local merge.jupyternotebook.driver '$(VENV)/bin/nbdev-merge %O %A %B %P'
	git config --local diff.jupyternotebook.command '$(VENV)/bin/nbdev-diff-driver'

profile: $(OK)      ## the profile in place; make profile NAME=smoke puts one there
	@toksr-profile $(NAME)

freeze: $(OK)       ## write constraints.txt from this environment
	python -m pip freeze --exclude-editable --exclude toksr > constraints.txt

clean:              ## remove what repro makes again; keep the environment, weights and reports
	rm -rf .work .ckpt dvc_plots
	mkdir -p build && find build -mindepth 1 -maxdepth 1 ! -name code ! -name probes -exec rm -rf {} +
