"""`toksr-repro` on a small pipeline of shell commands: the same results and dvc.lock as `dvc repro`, also when
things go wrong."""
import os, signal, subprocess, sys, time
from pathlib import Path

import pytest
import yaml

from toksr.pipeline.schedule import at_once, Plan, read_plan, schedule, told_seconds

PIPELINE = '''
stages:
  seed: {cmd: "cat in.txt > seed.txt", deps: [in.txt], outs: [seed.txt: {cache: false}]}
  left: {cmd: "date +%s.%N >> times.log; sleep $(cat nap); cat seed.txt > left.txt; date +%s.%N >> times.log", deps: [seed.txt], outs: [left.txt: {cache: false}]}
  right: {cmd: "date +%s.%N >> times.log; sleep $(cat nap); test ! -e broken && cat seed.txt > right.txt; date +%s.%N >> times.log", deps: [seed.txt], outs: [right.txt: {cache: false}]}
  both: {cmd: "cat left.txt right.txt > both.txt", deps: [left.txt, right.txt], outs: [both.txt: {cache: false}]}
  aside: {cmd: "cat other.txt > aside.txt", deps: [other.txt], outs: [aside.txt: {cache: false}]}
'''
ENV = os.environ | dict(SHELL='/bin/sh', DVC_NO_ANALYTICS='1')


@pytest.fixture
def toy(tmp_path):
    for name, text in {'dvc.yaml': PIPELINE, 'in.txt': 'a\n', 'other.txt': 'o\n', 'nap': '1',
                       'params.yaml': 'jobs: 2\n'}.items():
        (tmp_path/name).write_text(text)
    subprocess.run([sys.executable, '-m', 'dvc', 'init', '-q', '--no-scm'], cwd=tmp_path, check=True, env=ENV)
    return tmp_path


def listen():
    "A job in the background of a shell ignores Ctrl-C, and its children inherit that"
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def repro(root, *words, **kw):
    return subprocess.run([sys.executable, '-c', 'from toksr.pipeline.schedule import main; main()', *words], cwd=root,
                          capture_output=True, text=True, env=ENV, **kw)


def test_same_lock_as_dvc_and_side_by_side(toy):
    nap = (toy/'nap').read_text()
    (toy/'nap').write_text('4')                             # long against the start of a process on a busy machine
    one = repro(toy, '--jobs', '2')
    (toy/'nap').write_text(nap)
    assert one.returncode == 0, one.stdout+one.stderr
    t = sorted(map(float, (toy/'times.log').read_text().split()))
    assert t[3]-t[0] < 7.6, 'left and right, four seconds each, were not side by side'
    ours = (toy/'dvc.lock').read_bytes()
    (toy/'dvc.lock').unlink()
    subprocess.run([sys.executable, '-m', 'dvc', 'repro', '-q', '--force'], cwd=toy, check=True, env=ENV)
    assert (toy/'dvc.lock').read_bytes() == ours
    again = repro(toy, '--jobs', '2')
    assert again.returncode == 0 and again.stdout.startswith('0 ran, 5 unchanged'), again.stdout
    (toy/'in.txt').write_text('b\n')
    third = repro(toy)
    assert third.stdout.splitlines()[-1].startswith('4 ran, 1 unchanged') and (toy/'both.txt').read_text() == 'b\nb\n'
    subprocess.run([sys.executable, '-m', 'dvc', 'repro', '-q', '--force'], cwd=toy, check=True, env=ENV)
    after = (toy/'dvc.lock').read_bytes()
    assert repro(toy, '--force', '--jobs',
                 '3').stdout.splitlines()[-1].startswith('5 ran') and (toy/'dvc.lock').read_bytes() == after


def test_failure_stops_dependents_and_lets_others_finish(toy):
    (toy/'broken').touch()
    bad = repro(toy, '--jobs', '2')
    assert bad.returncode == 1 and 'failed: right' in bad.stderr and 'both' in bad.stderr
    assert (toy/'left.txt').read_text() == 'a\n' and not (toy/'both.txt').exists()
    (toy/'broken').unlink()
    good = repro(toy)
    assert good.returncode == 0 and (toy/'both.txt').exists()
    assert 'left │ Running' not in good.stdout, 'what had finished runs again'


def test_interrupt_ends_stages_and_can_go_on(toy):
    (toy/'nap').write_text('60')
    p = subprocess.Popen([sys.executable, '-c', 'from toksr.pipeline.schedule import main; main()'], cwd=toy,
                         preexec_fn=listen, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, env=ENV)
    for _ in range(300):
        if (toy/'times.log').exists() and len((toy/'times.log').read_text().split()) == 2: break
        time.sleep(.1)
    p.send_signal(signal.SIGINT)
    start = time.monotonic()
    err = p.communicate(timeout=40)[1]
    assert p.returncode == 1 and 'interrupted' in err and time.monotonic()-start < 20
    left = [q for q in Path('/proc').glob('[0-9]*/cwd') if _points_to(q, toy)]
    assert not left, f'processes survive: {left}'
    (toy/'nap').write_text('0')
    assert repro(toy).returncode == 0 and (toy/'both.txt').exists()


def _points_to(link, folder):
    try: return os.readlink(link) == str(folder)
    except OSError: return False


def test_unknown_stage_and_bad_numbers_are_one_line(toy):
    for words, said in (['nope'], 'nope'), (['--jobs', '0'], 'at least 1'):
        r = repro(toy, *words)
        assert r.returncode and said in r.stderr and 'Traceback' not in r.stderr


def test_targets_take_what_they_need(toy):
    plan = read_plan(toy, ['left'])
    assert set(plan.order) == {'seed', 'left'} and plan.stale == {'seed', 'left'}


@pytest.mark.parametrize('jobs', [1, 2, 3, 7])
@pytest.mark.parametrize('seed', range(5))
def test_random_graphs_run_in_order(jobs, seed):
    import random
    r = random.Random(seed)
    order = [f's{i}' for i in range(12)]
    up = {s: set(r.sample(order[:i], min(i, r.randint(0, 3)))) for i, s in enumerate(order)}
    stale, ended, crew = {s for s in order if r.random() < .3}, set(), []
    def start(name):
        assert up[name] & touched <= ended and len(crew) < jobs
        crew.append(name)
    def wait():
        name = crew.pop(r.randrange(len(crew)))
        ended.add(name)
        return name, 0, True
    plan = Plan(order, up, stale)
    touched = stale | plan.below(stale)
    out = schedule(plan, start, wait, jobs)
    assert set(out.ran) == touched and not out.failed and not out.left


def test_many_candidates_are_one_question():
    """What reads from a stage that ran is asked about in one go if it is much, and then only what changed is
    started, and what reads from that"""
    few, lots = [f's{i}' for i in range(12)], ['first', *(f's{i}' for i in range(12)), 'last']
    plan = Plan(lots, {'first': set(), **{s: {'first'} for s in few}, 'last': set(few)}, {'first'})
    asked, crew = [], []
    def changed():
        assert not crew
        asked.append(1)
        return {'s3', 'elsewhere'}
    out = schedule(plan, crew.append, lambda: (crew.pop(0), 0, True), 2, changed=changed)
    assert out.ran == ['first', 's3', 'last'] and len(asked) == 1 and len(out.unchanged) == 11
    out = schedule(plan, crew.append, lambda: (crew.pop(0), 0, True), 2, changed=changed, many=13)
    assert set(out.ran) == set(lots) and len(asked) == 1
    plan = Plan(lots, plan.up, set(lots))  # what `first` writes was missing, so that DVC called all of them changed
    out = schedule(plan, crew.append, lambda: (crew.pop(0), 0, True), 2, changed=changed)
    assert out.ran == ['first', 's3', 'last'] and len(asked) == 2 and len(out.unchanged) == 11
    assert schedule(plan, crew.append, lambda: (crew.pop(0), 0, True), 2).ran == lots


def test_an_edit_starts_what_it_changes_and_nothing_else(tmp_path):
    "Twelve stages read from one that runs, and one of them from a part of it that became another"
    cmd = 'mkdir -p parts && for i in 0 1 2 3 4 5 6 7 8 9 10 11; do grep "^$i " source > parts/$i; done'
    one = {f's{i}': dict(cmd=f'cp parts/{i} out{i}', deps=[f'parts/{i}'], outs=[{f'out{i}': dict(cache=False)}])
           for i in range(12)}
    (tmp_path/'dvc.yaml').write_text(yaml.safe_dump(dict(stages=dict(split=dict(cmd=cmd, deps=['source'],
            outs=[{f'parts/{i}': dict(cache=False)} for i in range(12)]), **one))))
    (tmp_path/'params.yaml').write_text('jobs: 2\n')
    (tmp_path/'source').write_text(''.join(f'{i} a\n' for i in range(12)))
    subprocess.run([sys.executable, '-m', 'dvc', 'init', '-q', '--no-scm'], cwd=tmp_path, check=True, env=ENV)
    assert '13 ran' in repro(tmp_path).stdout
    (tmp_path/'source').write_text((tmp_path/'source').read_text().replace('3 a', '3 b'))
    said = repro(tmp_path).stdout
    assert '2 ran, 11 unchanged' in said and "didn't change" not in said and (tmp_path/'out3').read_text() == '3 b\n', said
    # as in a new clone, where results are and what they were made from is not
    for part in (tmp_path/'parts').iterdir(): part.unlink()
    said = repro(tmp_path).stdout
    assert '1 ran, 12 unchanged' in said and "didn't change" not in said, said
    assert '13 ran' in repro(tmp_path, '--force').stdout


def test_what_takes_long_elsewhere_is_started_first(toy):
    (toy/'params.yaml').write_text('profile: tiny\n')
    assert told_seconds(toy) == {}
    (toy/'profiles').mkdir()
    table = toy/'profiles/tiny.minutes.csv'
    table.write_text('stage,minutes\nleft,2\nright,.5\n')
    assert told_seconds(toy) == {'left': 120, 'right': 30}
    plan = Plan(['right', 'left'], {'right': set(), 'left': set()}, {'right', 'left'})
    first = []
    schedule(plan, first.append, lambda: (first[-1], 0, True), 1, told_seconds(toy))
    assert first == ['left', 'right']
    table.write_text('stage,hours\nleft,2\n')
    with pytest.raises(ValueError, match='expected columns stage and minutes'): told_seconds(toy)
    r = repro(toy)
    assert r.returncode and 'tiny.minutes.csv' in r.stderr and 'Traceback' not in r.stderr


def test_a_profile_without_jobs_uses_the_cores(toy):
    assert at_once(10**6) == 1 and at_once(gib=1e-6) == len(os.sched_getaffinity(0))
    (toy/'params.yaml').write_text('profile: tiny\n')
    assert repro(toy).stdout.splitlines()[-1].startswith('5 ran')
