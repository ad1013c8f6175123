"""A split as models get it: which pictures, which captions, which encoder, and what stays on disk."""
import numpy as np
import pytest
import torch
from torch import nn

import toksr.training.splits
from toksr.data.corpora import save_corpus
from toksr.data.scenes import make_corpus
from toksr.tokenizers.running import encode_all
from toksr.tokenizers.titok import Tokenizer
from toksr.tokenizers.towers import TokenizerConfig
from toksr.training.loop import fit, Task
from toksr.training.optimizers import TrainConfig
from toksr.training.splits import home, load_split, on_gpu


@pytest.fixture(scope='module')
def scenes(): return make_corpus('train', 6, 32)


@pytest.fixture
def corpus(tmp_path, scenes):
    save_corpus(scenes, tmp_path/'train')
    return tmp_path


def test_without_pictures_of_its_own_super_resolution_takes_train(corpus, scenes):
    assert load_split(corpus, 'sr').name == 'train' and load_split(corpus, 'sr', 4).captions == scenes.captions[:4]
    save_corpus(scenes.part([5, 4]), corpus/'sr')
    own = load_split(corpus, 'sr')
    assert own.name == 'sr' and own.captions == [scenes.captions[5], scenes.captions[4]]


def test_a_missing_split_names_the_stage(corpus):
    with pytest.raises(FileNotFoundError, match='dvc repro corpus'): load_split(corpus, 'val')


def test_the_corpus_says_who_reads_its_captions(corpus):
    assert load_split(corpus, 'train').encoder == 'minilm'
    (corpus/'encoder.txt').write_text('clip:ViT-B-32:none\n')
    split = load_split(corpus, 'train')
    assert split.encoder == 'clip:ViT-B-32:none' and split.text.states.shape == (6, 77, 512) and split.text.mask is None
    (corpus/'encoder.txt').write_text('t5')
    with pytest.raises(ValueError, match="expected 'minilm' or 'clip:MODEL:WEIGHTS', got 't5'"):
        load_split(corpus, 'train')


def test_large_splits_stay_on_disk_and_give_the_same_tokens(corpus, monkeypatch):
    small = load_split(corpus, 'train')
    monkeypatch.setattr(toksr.training.splits, 'LARGE', 1000)
    large = load_split(corpus, 'train')
    assert isinstance(large.images,
                      np.memmap) and large.text.states.dtype == torch.float16 and small.text.states.dtype == torch.float32
    tok = Tokenizer(TokenizerConfig(image=32, n_tokens=4, width=4, encoder='d64x2', decoder='d64x2', text_width=384,
                                    text_length=24))
    assert torch.equal(encode_all(tok, large.images, large.text), encode_all(tok, small.images, small.text))


class Elsewhere(nn.Linear):
    "Remembers where it was sent"
    def to(self, *args, **kwargs):
        self.sent = [*getattr(self, 'sent', []), args[0]]
        return super().to(*args, **kwargs)


class OneStep(Task):
    def __init__(self):
        self.modules, self.friend = {'net': nn.Linear(2, 2)}, Elsewhere(2, 2)
        self.companions = (self.friend,)

    def loss(self, step, indices, generator):
        assert self.friend.sent == [self.device]
        return (self.modules['net'](torch.ones(1, 2, device=self.device))
                - self.friend(torch.ones(1, 2, device=self.device)).detach()).square().mean(), {}


def test_companions_are_where_the_training_is():
    task = OneStep()
    before = task.friend.weight.clone()
    fit(task, TrainConfig(steps=2, batch=1, warmup=1), 1, callbacks=[])
    assert torch.equal(task.friend.weight,
                       before) and home(task.friend) == home(task.modules['net']) == torch.device('cpu')


@pytest.mark.skipif(torch.cuda.is_available(), reason='has a GPU')
def test_without_a_gpu_nothing_moves():
    net = Elsewhere(2, 2)
    with on_gpu(net, nn.Identity()) as device: assert device == torch.device('cpu')
    assert not hasattr(net, 'sent') and home(nn.Identity()) == torch.device('cpu')


class TooBig(OneStep):
    "A loss for which at most two items fit into memory"
    sizes = ()
    def __init__(self): self.modules = {'net': nn.Linear(2, 1)}

    def loss(self, step, indices, generator):
        self.sizes += (len(indices),)
        if len(indices) > 2: raise torch.cuda.OutOfMemoryError('CUDA out of memory')
        x = torch.from_numpy(np.stack([indices, indices**2], 1)).float() / 30
        return (self.modules['net'](x) - 1).square().mean(), {}


def test_a_batch_that_does_not_fit_is_cut_and_gives_the_same_weights(capsys):
    def weights(task, micro):
        nn.init.constant_(task.modules['net'].weight, .1)
        nn.init.zeros_(task.modules['net'].bias)
        fit(task, TrainConfig(steps=3, batch=6, warmup=1, lr=.01, micro=micro), 6, callbacks=[])
        return task.modules['net'].weight.clone()
    cut = TooBig()
    assert torch.equal(weights(cut, 1), weights(TooBig(), 4))
    assert cut.sizes[:4] == (6, 3, 2, 2) and max(cut.sizes[4:]) == 2          # no second try in the next steps
    assert 'cut into 4 pieces' in capsys.readouterr().err


class NeverFits(TooBig):
    def loss(self, step, indices, generator): raise torch.cuda.OutOfMemoryError('CUDA out of memory')


def test_a_single_item_that_does_not_fit_is_an_error():
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fit(NeverFits(), TrainConfig(steps=1, batch=4, warmup=1), 4, callbacks=[])
