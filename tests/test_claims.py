"The ledger of claims: rows that name something, numbers that are looked up, verdicts by one rule."
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml
from dvc.repo import Repo

from toksr.pipeline.claims import Claim, judge, ledger, Measure, measured, MISSING, NotMeasured, read_claims, VERDICTS

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = read_claims(ROOT/'nbs/study/claims.yaml')
with Repo(str(ROOT)) as repo: STAGES = {s.addressing: s for s in repo.index.stages}
BASE = dict(id='T-x', where='Fig. 0', says='a is better', statistic='a - b', notebook='nowhere', source='x.csv')


def test_the_stage_reads_what_the_claims_read():
    deps = {d.def_path for d in STAGES['claims'].deps}
    assert {f'reports/{c.source}' for c in CLAIMS if c.source} <= deps


@pytest.mark.parametrize('claim', CLAIMS, ids=lambda c: c.id)
def test_a_claim_names_the_study_that_measures_it(claim):
    outs = {o.def_path for o in STAGES[claim.notebook].outs}
    assert not claim.source or f'reports/{claim.source}' in outs


def test_the_table_in_reports_is_what_the_results_say():
    now = ledger(CLAIMS, ROOT/'reports').fillna('').astype(str)
    kept = pd.read_csv(ROOT/'reports/exhibits/claims.csv', dtype=str).fillna('')
    assert [*kept.id] == [*now.id] and [*kept.verdict] == [*now.verdict] and [*kept.val] == [*now.val]
    assert all(re.sub(r' \(.*', '', v) in VERDICTS for v in kept.verdict)


@pytest.mark.parametrize('lo, hi, want',
                         [(.1, 2, 'reproduced'), (-.1, 2, 'direction only'), (-2, .1, 'not reproduced'),
                          (-2, -.1, 'the opposite'), (-9, 9.5, 'not testable at this budget')])
def test_the_rule_is_symmetric(lo, hi, want):
    m = Measure((lo + hi) / 2, lo, hi, 9)
    assert judge(Claim(**BASE, resolution=5.), m) == want
    assert judge(Claim(**BASE, resolution=5., expect='-'), Measure(-m.effect, -m.hi, -m.lo, 9)) == want


def test_numbers_come_from_csv_cells_lists_and_keys(tmp_path):
    (tmp_path/'x.csv').write_text('split,k,cell,n\nval,1,"0.5 [-0.25, 1.25]",7\n')
    (tmp_path/'x.json').write_text('{"metrics": {"val/a": {"mean": 1.5, "lo": 1, "hi": 2, "n": 3}, "rows": [{"split": '
                                   '"val", "k": 1, "effect": 1, "lo": 0, "hi": 2, "n": 5}], "deep": {"b": {"effect": '
                                   '4, "lo": 3, "hi": 5, "n": 2}}}}')
    get = lambda **k: measured(Claim(**BASE | k), 'val', tmp_path)
    assert get(pick={'k': 1}, columns=('cell',)) == (.5, -.25, 1.25, 7)
    assert get(source='x.json', pick={'key': '{split}/a'}, columns=('mean', 'lo', 'hi'), minus=1.) == (.5, 0, 1, 3)
    assert get(source='x.json', pick={'list': 'rows', 'where': {'k': 1}}) == (1, 0, 2, 5)
    assert get(source='x.json', pick={'key': ['deep', 'b']}) == (4, 3, 5, 2)
    for bad, said in (({'pick': {'k': 2}}, 'expected one'), ({'source': 'x.json', 'pick': {'key': 'c'}}, "has no 'c'"),
                      ({'source': 'x.json', 'pick': {'list': 'rows', 'where': {'k': 2}}}, 'expected one')):
        with pytest.raises(NotMeasured, match=said): get(**bad)
        assert [*ledger([Claim(**BASE | dict(splits=('val',)) | bad)], tmp_path).verdict] == [MISSING]
    for bad, said in (({'pick': {'j': 1}}, 'no column'), ({'source': 'y.csv'}, 'dvc repro nowhere')):
        with pytest.raises(ValueError, match=said) as e: get(**bad)
        assert not isinstance(e.value, NotMeasured)


@pytest.mark.parametrize('text, said',
                         [('a: 1', 'expected a list'),
                          ('- {id: T-a, where: x, says: y, colour: red}', 'unknown fields'),
                          ('- {id: T-a, where: x, says: y}', 'are needed'),
                                        ('- {id: X-a, where: x, says: y, impossible: z}', 'begins with'),
                                        ('- {id: T-a, where: x, says: y, impossible: z, expect: "0"}', 'expect'),
                                        ('- &a {id: T-a, where: x, says: y, impossible: z}\n- *a', 'more than once'),
                                        ('- {where: x}', 'T-|missing|argument')])
def test_a_bad_ledger_is_named(tmp_path, text, said):
    (tmp_path/'c.yaml').write_text(text)
    with pytest.raises(ValueError, match=said) as e: read_claims(tmp_path/'c.yaml')
    assert 'c.yaml' in str(e.value)


def test_the_ledger_is_plain_yaml():
    assert len(yaml.safe_load((ROOT/'nbs/study/claims.yaml').read_text())) == len(CLAIMS) > 30
