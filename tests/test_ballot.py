"The ballot: blind, complete, scored right, and working in a real browser."
import json
import shutil
import time

import numpy as np
import pytest

from toksr.pipeline.ballot import (
    agreement, ballot_id, make_ballot, page_text, preferences, read_votes, score, write_ballot,
)

METHODS = ('SEED-like', 'LaVIT-like', 'dual')


def _ballot(n=3, secret='s'):
    rng = np.random.default_rng(0)
    return make_ballot('Which is <most> like it?', rng.random((n, 8, 8, 3)),
                       {m: rng.random((n, 8, 8, 3)) for m in METHODS}, secret)


def _file(folder, ballot, voter, order):
    ranks = {f's{i}': [next(k for k, v in ballot.key.items() if v == [i, m]) for m in order]
             for i in range(len(ballot.originals))}
    (folder/f'votes-{voter}.json').write_text(json.dumps(dict(ballot=ballot_id(ballot), voter=voter, ranks=ranks)))


@pytest.fixture
def place(tmp_path):
    ballot = _ballot()
    write_ballot(ballot, tmp_path/'ballot.html', tmp_path/'key.json')
    return tmp_path, ballot


def test_the_page_is_blind_and_alone():
    text = page_text(_ballot())
    assert not [m for m in METHODS if m in text], 'a method is named'
    assert 'src="http' not in text and '@import' not in text and '&lt;most&gt;' in text


def test_no_votes_no_numbers(place):
    folder, _ = place
    votes = read_votes(folder, folder/'key.json')
    assert len(votes) == 0 and score(votes) == {} and agreement(votes) is None and len(preferences(votes)) == 0


def test_points_and_agreement(place):
    folder, ballot = place
    _file(folder, ballot, 'a', ('dual', 'LaVIT-like', 'SEED-like'))
    _file(folder, ballot, 'b', ('dual', 'SEED-like', 'LaVIT-like'))
    votes = read_votes(folder, folder/'key.json')
    assert {m: s.mean for m, s in score(votes).items()} == {'dual': 3., 'LaVIT-like': 1.5, 'SEED-like': 1.5}
    assert agreement(votes) == pytest.approx(.75)                      # sums 6, 3, 3: S = 6; 12 · 6 / (4 · 24)
    assert preferences(votes).set_index(['a', 'b']).share['LaVIT-like', 'dual'] == 0


@pytest.mark.parametrize('spoil, says', [
    (lambda v: v | dict(ballot='0' * 16), 'is of ballot'), (lambda v: v | dict(ranks={'s0': []}), 'row s0'),
    (lambda v: v | dict(voter='a'), 'voted in'),
    (lambda v: [1], 'expected a file saved')])
def test_what_cannot_count_is_named(place, spoil, says):
    folder, ballot = place
    _file(folder, ballot, 'a', METHODS)
    _file(folder, ballot, 'b', METHODS)
    f = folder/'votes-b.json'
    f.write_text(json.dumps(spoil(json.loads(f.read_text()))))
    with pytest.raises(ValueError, match=rf'votes-b\.json.*{says}'): read_votes(folder, folder/'key.json')


def test_unequal_sets_are_refused():
    with pytest.raises(ValueError, match='expected 2 pictures'):
        make_ballot('x', np.zeros((2, 4, 4, 3)), {'a': np.zeros((2, 4, 4, 3)), 'b': np.zeros((1, 4, 4, 3))})


@pytest.fixture
def browser(place):
    "Headless Chromium on the page, opened as a file"
    from selenium import webdriver
    found, driver = shutil.which('chromium'), shutil.which('chromedriver')
    assert found and driver, 'this test clicks in a browser: apt-get install chromium chromium-driver (make test does)'
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for a in ('--headless=new', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
              '--disable-component-update', '--disable-sync',
              '--disable-dev-shm-usage', '--window-size=1100,1400'): options.add_argument(a)
    options.add_experimental_option('prefs',
                                    {'download.default_directory': str(place[0]),
                                     'download.prompt_for_download': False})
    page = webdriver.Chrome(options, webdriver.ChromeService(driver))
    page.get((place[0]/'ballot.html').as_uri())
    yield page
    page.quit()


def test_a_person_votes_in_a_browser(place, browser):
    "Rank all rows by clicks, take one back, save the file, and score it"
    from selenium.webdriver.common.by import By
    folder, ballot = place
    save = lambda: browser.find_element(By.ID, 'save')
    assert not save().is_enabled()
    browser.find_element(By.ID, 'voter').send_keys('Ann 1\t')
    want = {}
    for i, row in enumerate(browser.find_elements(By.CLASS_NAME, 'set')):
        buttons = row.find_elements(By.TAG_NAME, 'button')
        assert len(buttons) == 3 and all(b.find_element(By.TAG_NAME, 'img').size['width'] == 192 for b in buttons)
        buttons[0].click()
        buttons[0].click()                          # taken back
        for b in (buttons[2], buttons[0], buttons[1]): b.click()
        want[ballot.key[buttons[2].get_attribute('data-mark')][0]] = ballot.key[buttons[2].get_attribute('data-mark')][1]
    assert browser.find_element(By.ID, 'left').text == 'complete' and save().is_enabled()
    save().click()
    file = folder/'votes-Ann_1.json'
    for _ in range(100):
        if file.is_file(): break
        time.sleep(.1)
    votes = read_votes(folder, folder/'key.json')
    assert len(votes) == 9 and set(votes.voter) == {'Ann 1'}
    assert {r.set: r.method for r in votes[votes.points == 3].itertuples()} == want
