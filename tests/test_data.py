"Pictures from files, captions, stamps, scenes, corpora: what teaches nothing in a chapter."
import hashlib
import io
import json
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, PngImagePlugin

from toksr.core.paths import stamps_dir
from toksr.data.captions import article, BY_HAND, clean_caption, head_noun, MAX_WORDS, mtld, words
from toksr.data.collections import coco_corpus, imagenet_enriched_corpus
from toksr.data.corpora import collect, Corpus, folder_corpus, load_corpus, save_corpus
from toksr.data.images import BadImage, fit, read_image
from toksr.data.scenes import (
    caption_of, COLOURS, load_textures, make_corpus, partial_captions, SceneMaker, SPLITS, TEXTURES,
    wrong_captions,
)
from toksr.data.stamps import IS_PHOTO, load_stamps, look_alike, manifest, NO_MIRROR, novel_families, stamp_files

GOLDEN = Path(__file__).parent/'golden'
rng = np.random.default_rng(0)
# 40 56 3
SMOOTH = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((56, 40),
                                                                                      Image.Resampling.BICUBIC))


# ---- files

def saved(image, **options):
    image.save(f := io.BytesIO(), **options)
    return f.getvalue()


@pytest.mark.parametrize('format,worst',
                         [('PNG', 0), ('BMP', 0), ('TIFF', 0), ('PPM', 0), ('GIF', 9), ('JPEG', 9), ('WEBP', 9)])
def test_formats_whatever_the_suffix(tmp_path, format, worst):
    (p := tmp_path/'picture.xyz').write_bytes(saved(Image.fromarray(SMOOTH), format=format))
    assert np.abs(read_image(p).astype(int) - SMOOTH).mean() <= worst


@pytest.mark.parametrize('format', ['PNG', 'TIFF'])
def test_sixteen_bit_grey_is_scaled(format):
    grey = np.linspace(0, 65535, 40 * 56).reshape(40, 56).astype(np.uint16)
    x = read_image(saved(Image.fromarray(grey), format=format))
    assert np.abs(x[..., 0] - grey / 257).max() <= .5 and (x[..., 0] == x[..., 2]).all()


def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def test_sixteen_bit_rgb():
    x = np.array([[[0, 32896, 65535], [257, 514, 65278]]], '>u2')
    png = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 2, 1, 16, 2, 0, 0, 0)) + chunk(b'IDAT',
            zlib.compress(b'\0' + x.tobytes())) + chunk(b'IEND', b'')
    assert np.abs(read_image(png).astype(int) - x.astype(int) / 257).max() <= 1


def test_floats_need_a_range():
    assert read_image(saved(Image.fromarray(np.full((2, 2), .5, np.float32)), format='TIFF')).max() == 128
    with pytest.raises(BadImage, match='outside 0 to 1'):
        read_image(saved(Image.fromarray(np.full((2, 2), 200, np.float32)), format='TIFF'))
    with pytest.raises(BadImage, match='outside'):
        read_image(saved(Image.fromarray(np.full((2, 2), np.nan, np.float32)), format='TIFF'))


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'PA'])
def test_transparent_is_white(mode):
    im = Image.new('RGBA', (4, 2), (10, 20, 30, 0))
    im.paste((0, 0, 0, 255), (0, 0, 2, 2))
    if mode == 'P':
        im = Image.new('P', (4, 2), 1)
        im.putpalette([0, 0, 0, 10, 20, 30])
        im.paste(0, (0, 0, 2, 2))
        data = saved(im, format='PNG', transparency=1)
    elif mode == 'PA': data = saved(im.quantize(), format='PNG')
    else: data = saved(im.convert(mode), format='PNG')
    x = read_image(data)
    assert (x[:, :2] == 0).all() and (x[:, 2:] == 255).all()


def test_colour_declared_transparent():
    x = read_image(saved(Image.new('RGB', (2, 2), (1, 2, 3)), format='PNG', transparency=(1, 2, 3)))
    assert (x == 255).all()


@pytest.mark.parametrize('turn', range(1, 9))
def test_every_exif_orientation(turn):
    ops = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE,
           # how the camera stored it
           6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
    im, exif = Image.fromarray(SMOOTH), Image.Exif()
    exif[0x112] = turn
    stored = im.transpose(ops[turn]) if turn > 1 else im
    assert (read_image(saved(stored, format='PNG', exif=exif)) == SMOOTH).all()


def test_broken_exif_is_ignored():
    data = saved(Image.fromarray(SMOOTH), format='PNG', exif=b'Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage')
    assert (read_image(data) == SMOOTH).all()


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
def test_bad_colour_profile_is_ignored(mode):
    im = Image.fromarray(SMOOTH).convert(mode)
    x = read_image(saved(im, format='JPEG', quality=95, icc_profile=b'\x00\x00\x0c\x48Lino not a profile' * 20))
    assert np.abs(x.astype(int) - np.asarray(im.convert('RGB'))).mean() < 4


def test_good_colour_profile_is_applied():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    assert np.abs(read_image(saved(Image.fromarray(SMOOTH), format='PNG', icc_profile=srgb)).astype(int)
                  - SMOOTH).max() <= 1
    # a profile of another colour space than the image
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile('LAB')).tobytes()
    assert np.abs(read_image(saved(Image.fromarray(SMOOTH), format='PNG', icc_profile=lab)).astype(int)
                  - SMOOTH).max() <= 1


def test_first_frame_of_an_animation():
    frames = [Image.new('RGB', (8, 8), c) for c in ('red', 'blue')]
    for format in 'GIF', 'WEBP', 'PNG', 'TIFF':
        x = read_image(saved(frames[0], format=format, save_all=True, append_images=frames[1:],
                             **(dict(lossless=True) if format == 'WEBP' else {})))
        assert (x == (255, 0, 0)).all(), format


@pytest.mark.parametrize('format', ['PNG', 'JPEG', 'GIF', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('share', [0, .02, .3, .6, .9])
def test_truncated(format, share, tmp_path):
    data = saved(Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)), format=format)
    (p := tmp_path/f'cut.{format.lower()}').write_bytes(data[:int(share * len(data))])
    with pytest.raises(BadImage) as e: read_image(p)
    assert e.value.file == str(p) and e.value.reason and '\n' not in str(e.value)


def test_truncated_stays_an_error_when_a_library_allows_it(monkeypatch):
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', True)
    data = saved(Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)), format='JPEG')
    with pytest.raises(BadImage): read_image(data[:len(data) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize('data',
                         [b'', b'\0', bytes(10_000), b'<!doctype html>',
                          b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n', b'BM' + bytes(60), b'GIF89a',
                          b'\xff\xd8\xff',
                                  b'\x89PNG\r\n\x1a\n', b'RIFF\x10\0\0\0WEBP', b'II*\0\x08\0\0\0'])
def test_not_images(data):
    with pytest.raises(BadImage, match='.'): read_image(data)


def test_bombs():
    for w, h in ((20_000, 20_000), (2**31 - 1, 2**31 - 1), (0, 5), (60_000, 2_000)):
        png = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0)) + chunk(b'IDAT',
                zlib.compress(bytes(100_000))) + chunk(b'IEND', b'')
        start = time.perf_counter()
        with pytest.raises(BadImage): read_image(png)
        assert time.perf_counter() - start < 2
    with pytest.raises(BadImage, match='at most 1,000'):
        read_image(saved(Image.fromarray(SMOOTH), format='PNG'), max_pixels=1000)
    assert Image.MAX_IMAGE_PIXELS and PngImagePlugin.MAX_TEXT_CHUNK


def test_huge_text_chunk():
    png = saved(Image.fromarray(SMOOTH), format='PNG')
    with_text = png[:33] + chunk(b'zTXt', b'Comment\0\0' + zlib.compress(bytes(50_000_000))) + png[33:]
    try: assert (read_image(with_text) == SMOOTH).all()
    except BadImage as e: assert len(str(e)) < 300


def test_no_file(tmp_path):
    for p in tmp_path/'none.png', tmp_path:
        with pytest.raises(BadImage): read_image(p)


def test_fuzz():
    "Whatever bytes are turned over, there is a picture or a reason."
    seeds = [saved(Image.fromarray(SMOOTH), format=f) for f in ('PNG', 'JPEG', 'GIF', 'WEBP', 'TIFF', 'BMP')]
    r, outcomes = np.random.default_rng(1), []
    for i in range(600):
        data = bytearray(seeds[i % len(seeds)])
        for k in r.integers(0, len(data), int(r.integers(1, 20))): data[k] = r.integers(256)
        try:
            x = read_image(bytes(data))
            outcomes.append(x.dtype == np.uint8 and x.ndim == 3 and x.shape[-1] == 3)
        except BadImage as e: outcomes.append(bool(e.reason))
    assert all(outcomes) and len(outcomes) == 600


def test_fit():
    assert fit(np.zeros((1, 1, 3), np.uint8), 64).shape == (64, 64, 3)
    assert fit(np.zeros((1, 500, 3), np.uint8), 8).shape == fit(np.zeros((500, 1, 3), np.uint8), 8,
                                                                'squash').shape == (8, 8, 3)
    with pytest.raises(ValueError, match="'crop' or 'squash'"): fit(SMOOTH, 8, 'pad')


# ---- captions

@pytest.fixture(scope='module')
def stamps(): return load_stamps(px=96)


def test_all_captions_are_noun_phrases(stamps):
    for s in stamps:
        first, n = s.caption.split()[0], len(s.caption.split())
        assert 1 <= n <= MAX_WORDS and s.caption[-1].isalnum() and not set('.!?"“”()—;,') & set(s.caption), s.caption
        if first in ('a', 'an'): assert article(s.caption.split(maxsplit=1)[1]) == s.caption
        else:
            assert first in ('the', 'two', 'some') or s.caption in ('Santa Claus', 'broccoli', 'fire', 'holly leaves',
                                                                    'rugby goal posts', 'big fireworks'), s.caption
        assert first == first.lower() or first == 'Santa'


def test_hand_written_captions_are_needed(stamps):
    "No entry for a file that is not there, and none that only repeats the rules"
    files = dict(stamp_files())
    assert not set(BY_HAND) - set(files)
    idle = [n for n, c in BY_HAND.items() if clean_caption(files[n].with_suffix('.txt').read_text()) == c]
    assert not idle
    names = {s.name for s in stamps}
    assert set(BY_HAND) <= names and set(IS_PHOTO) <= names


@pytest.mark.parametrize('name,caption', {
    'animals/mammals/hippopotamus': 'a hippopotamus', 'animals/fish/lobster': 'a spiny lobster',
    'animals/birds/guineafowl': 'a guinea fowl',
    'animals/birds/peacock': 'a peacock', 'animals/insects/hoverfly': 'a hoverfly',
    'animals/mammals/bears/european-bear': 'a European bear',
    'animals/mammals/wildboar': 'two wild boars', 'clothes/t_tshirt': 'a T-shirt', 'food/fruit/orange': 'an orange',
    'food/fruit/orange_seville': 'a Seville orange',
    'food/vegetables/tomato': 'a ripe red tomato', 'household/toilet': 'a toilet',
    'medical/stethoscope': 'a stethoscope', 'military/vehicles/f22_raptor': 'an F-22 Raptor',
    'plants/trees/holly_leaves': 'holly leaves', 'seasonal/christmas/Mince_Pie': 'a mince pie',
    'seasonal/hanukkah/dreydl-nun': 'a dreidel', 'space/planets/3_earth': 'the Earth',
    'town/roadsigns/stop': 'a stop sign', 'vehicles/7spoke256': 'a wheel',
    'vehicles/locomotive/cartoon/tanker': 'a tank wagon', 'vehicles/auto/beetle': 'a VW Beetle'}.items())
def test_tricky_captions(stamps, name, caption):
    assert {s.name: s.caption for s in stamps}[name] == caption


# ---- stamps

def test_photographs_are_told_from_drawings(stamps):
    "Against all stamps, sorted by eye: the score alone is 95 % right, with the named exceptions all of them"
    drawn = set((GOLDEN/'drawn_stamps.txt').read_text().split())
    assert np.mean([(s.score > 0) == (s.name in drawn) for s in stamps]) >= .945
    assert [s.name for s in stamps if s.is_photo == (s.name in drawn)] == []
    assert sum(s.is_photo for s in stamps) > 300 and len(drawn) > 150


def test_mirror_marks_are_the_packages(stamps):
    "Where the package's side files are present, the list in the chapter says the same"
    marked = {n for n, p in stamp_files() if (d := p.with_suffix('.dat')).exists()
              and 'nomirror' in d.read_text(errors='replace')}
    if not marked: pytest.skip('the copy of the stamps has no .dat files')
    assert {s.name for s in stamps if not s.can_mirror} == NO_MIRROR == marked & {s.name for s in stamps}


def test_novel_families_are_new(stamps):
    novel = novel_families(stamps, keep=set(TEXTURES))
    held, rest = ([s for s in stamps if (s.family in novel) == is_out] for is_out in (True, False))
    n = len({s.family for s in stamps if s.is_photo})
    assert len(novel) == round(.12 * n) and 25 <= sum(s.is_photo for s in held) <= 80
    assert not any(look_alike(a.phash, b.phash) or look_alike(b.phash, a.phash) for a in held for b in rest)
    assert not {head_noun(s.caption) for s in held} & {head_noun(s.caption) for s in rest}
    assert not {s.name for s in held} & set(TEXTURES)
    assert novel == novel_families(stamps[::-1], keep=set(TEXTURES)) != novel_families(stamps,
                                                                                       keep=set(TEXTURES), seed=1)


def test_no_symbols_no_mirrors_no_twins(stamps):
    assert not [s.name for s in stamps if s.name.startswith('symbols') or 'mirror' in s.name]
    assert len({s.phash for s in stamps}) == len(stamps) and [s.name for s in stamps] == [n for n, _ in stamp_files()
            if n in {s.name for s in stamps}]


def test_stamps_from_an_odd_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='tuxpaint'): load_stamps(tmp_path)
    (tmp_path/'things').mkdir()
    for name, caption in {'cup': 'A cup!', 'blank': 'Nothing.', 'speck': 'A speck.', 'wordless': '…',
                          'latin': 'Un café\n'}.items():
        im = Image.new('RGBA', (60, 60), (200, 30, 30, 0 if name == 'blank' else 255))
        im.paste((len(name) * 20, 9, 9, 255) if name != 'blank' else (0, 0, 0, 0), (0, 0, 9 * len(name), 9))
        if name == 'speck': im = im.crop((0, 0, 10, 10))
        im.save(tmp_path/'things'/f'{name}.png')
        (tmp_path/'things'/f'{name}.txt').write_bytes(caption.encode('latin-1' if name == 'latin' else 'utf-8'))
    Image.new('RGB', (9, 9)).save(tmp_path/'things'/'nocaption.png')
    loaded = load_stamps(tmp_path)
    assert [s.name for s in loaded] == ['things/cup', 'things/latin'] and loaded[0].caption == 'a cup'
    before = manifest(tmp_path)
    (tmp_path/'things'/'cup.txt').write_text('A mug.')
    assert manifest(tmp_path) != before == before.lower() and len(before) == 64


# ---- scenes

def sha(x): return hashlib.sha256(x).hexdigest()[:16]


def test_scenes_are_what_they_were(stamps):
    """Golden: SHA-256 of the first 100 scenes of each split at the freeze of the generator; all results rest on
    these pixels"""
    if manifest() != '1005d73d7d080098a84c717cc7ff9df566bec9221dedf2c668c88e3c0c4750ba':
        pytest.skip('another version of the stamps')
    assert {s: sha(make_corpus(s, 100, stamps=stamps).images.tobytes()) for s in SPLITS} == GOLDEN_SCENES


GOLDEN_SCENES = {'train': '32c610e93d4801bd', 'val': 'd7aa31dc7af3379e', 'novel': '34ebd12ac960e934',
                 'complex': '12c8f25ed71b2605'}


def test_scenes_by_number(stamps):
    a, b = SceneMaker(stamps, split='val', seed=3), SceneMaker(stamps, split='val', seed=3)
    some = [b.scene(i) for i in (9, 2, 9)]
    assert (some[0].image == some[2].image).all() and (a.scene(9).image == some[0].image).all() and a.scene(2).caption == some[1].caption
    assert (SceneMaker(stamps, split='val', seed=4).scene(9).image != some[0].image).any()
    for i in range(300):
        s = a.scene(i)
        assert s.image.shape == (64, 64, 3) and s.image.dtype == np.uint8
        assert s.caption == caption_of(s.objects,
                                       s.background) and 1 <= len(s.objects) <= 3 and len(set(s.objects)) == len(s.objects)
        assert ' a a' not in s.caption and ' a o' not in s.caption and s.caption[0].isupper() and s.caption.endswith('.')


def test_mix(stamps):
    m = SceneMaker(stamps, split='train')
    scenes = [m.scene(i) for i in range(1500)]
    n = np.bincount([len(s.objects) for s in scenes], minlength=4) / 1500
    assert np.abs(n[1:] - (.65, .30, .05)).max() < .04
    kinds = np.array([[s.background.endswith('background') for s in scenes], ['fading' in s.background for s in scenes],
                      [s.background.endswith('texture') for s in scenes]]).mean(1)
    assert np.abs(kinds - (.34, .34, .32)).max() < .04
    drawn = {s.caption for s in stamps if not s.is_photo} - {s.caption for s in stamps if s.is_photo}
    assert not any(set(s.objects) & drawn for s in scenes)
    every = {s.caption for s in stamps}
    c = SceneMaker(stamps, split='complex')
    for s in (c.scene(i) for i in range(200)):
        assert set(s.objects) <= every and (len(s.objects) == 3
                                            or set(s.objects) & {t.caption for t in stamps if not t.is_photo})


def test_objects_are_whole_and_seen(stamps):
    """On black and on white the same object leaves the same pixels, so the difference shows where it is: inside,
    and of the promised size"""
    m = SceneMaker(stamps, objects=(1, 0, 0), backgrounds=(1, 0, 0))
    ratios = []
    for i in range(60):
        s = m.scene(i)
        back = np.median(s.image[[0, 0, -1, -1], [0, -1, 0, -1]], 0)
        ys, xs = np.where(np.abs(s.image.astype(int) - back).max(-1) > 25)
        if len(ys): ratios.append(max(np.ptp(ys), np.ptp(xs)) / 64)
    assert len(ratios) >= 55 and .5 < np.median(ratios) < .95


def test_textures_do_not_overlap():
    train, held = (load_textures(stamps_dir(), side) for side in (False, True))
    by = {p: np.asarray(im) for p, im in train}
    for phrase, im in held:
        x = np.asarray(im)
        if phrase not in by: continue
        t = by[phrase]
        h = min(len(t), len(x))
        assert not any((t[:h, k] == x[:h, 0]).all() for k in range(t.shape[1])), phrase
    assert len(by) >= 20 and len(held) >= 15


def test_difficulty(stamps):
    "What bicubic keeps, as in the prototype (25.4 dB from 16 px, 22.5 dB from 8 px), within half a decibel"
    c = make_corpus('val', 400, stamps=stamps)
    for px, wanted in ((16, 25.4), (8, 22.5)):
        psnr = []
        for im in c.images:
            up = Image.fromarray(im).resize((px, px), Image.Resampling.BICUBIC).resize((64, 64),
                                                                                       Image.Resampling.BICUBIC)
            psnr.append(10 * np.log10(255**2 / np.square(np.asarray(up, dtype=np.float32) - im).mean()))
        assert abs(np.mean(psnr) - wanted) < .5


def test_speed(stamps):
    """A thousand scenes a second of processor time on a quiet core; half of that is demanded here, since machines
    differ and are shared"""
    m = SceneMaker(stamps)
    best = 0
    for k in range(3):
        start = time.process_time()
        for i in range(200): m.scene(200 * k + i)
        best = max(best, 200 / (time.process_time() - start))
    assert best > 500, f'{best:.0f} scenes a second'


def test_larger_scenes(stamps):
    """At 256 px the same things stand on the same backgrounds; only the places differ, because they are counted in
    pixels"""
    large = make_corpus('train', 3, 256, stamps=load_stamps(px=384))
    assert large.images.shape == (3, 256, 256, 3) and make_corpus('train', 3, 128, stamps=stamps).images.shape == (3,
            128, 128, 3)
    assert large.captions[0].split()[:2] == make_corpus('train', 1, 64, stamps=stamps).captions[0].split()[:2]


def test_colour_names_are_nearest():
    "Each named colour, shifted as scenes shift it, is nearer to its own name than to another for at least 19 of 20"
    names, values = list(COLOURS), np.array(list(COLOURS.values()), float)
    shifted = values[:, None] + np.random.default_rng(0).normal(0, 8, (len(values), 200, 3))
    nearest = np.linalg.norm(shifted[:, :, None] - values, axis=-1).argmin(-1)
    assert ((nearest == np.arange(len(names))[:, None]).mean(1) > .95).all()


def test_no_stamps():
    with pytest.raises(ValueError, match='photographs'): SceneMaker([])


# ---- corpora

def small(n=6): return Corpus(rng.integers(0, 256, (n, 8, 8, 3), np.uint8), [f'Caption {i}.' for i in range(n)])


def test_save_and_load(tmp_path):
    c = Corpus(small().images, list('abcdef'), [['a tiger']] * 6, ['a „white“ background'] * 6)
    back = load_corpus(save_corpus(c, tmp_path/'x'))
    assert (back.images == c.images).all() and (back.captions, back.objects, back.backgrounds) == (c.captions,
            c.objects, c.backgrounds)
    assert sorted(p.name for p in (tmp_path/'x').iterdir()) == ['captions.json', 'images.npy']
    assert len(back.part([1, 3])) == 2 and back.part(slice(2)).captions == ['a',
            'b'] and back.part([]).images.shape == (0, 8, 8, 3)


@pytest.mark.parametrize('harm', ['json', 'key', 'count', 'pickle', 'cut'])
def test_damaged_corpora(tmp_path, harm):
    d = save_corpus(small(), tmp_path)
    said = json.loads((d/'captions.json').read_text())
    if harm == 'json': (d/'captions.json').write_text('{')
    if harm == 'key': (d/'captions.json').write_text(json.dumps({k: v for k, v in said.items() if k != 'objects'}))
    if harm == 'count': (d/'captions.json').write_text(json.dumps(said | dict(captions=said['captions'][:2])))
    if harm == 'pickle': np.save(d/'images.npy', np.array([object()]), allow_pickle=True)
    if harm == 'cut': (d/'images.npy').write_bytes((d/'images.npy').read_bytes()[:200])
    with pytest.raises(ValueError, match='damaged corpus'): load_corpus(d)


def test_captions_of_others():
    c = Corpus(small(5).images, list('abcde'), [['a cat'], ['a cat', 'a dog'], ['a dog'], ['a bus'], ['a car']],
               ['a sky'] * 5)
    for seed in range(20):
        wrong = wrong_captions(c, seed)
        at = ['abcde'.index(w) for w in wrong]
        assert sorted(wrong) == list('abcde') and not any(set(c.objects[i]) & set(c.objects[j])
                                                          for i, j in enumerate(at))
    assert partial_captions(c) == ['A sky.', 'A cat on a sky.', 'A sky.', 'A sky.', 'A sky.']
    assert partial_captions(c, drop=0, background=False) == ['', 'A dog.', '', '', '']
    with pytest.raises(ValueError, match='no way found'): wrong_captions(c.part([0, 1]))


def test_folder(tmp_path):
    (tmp_path/'sub').mkdir()
    texts = {'a.png': 'One.\n', 'b.jpg': 'Two\tlines\nhere.', 'sub/c.webp': 'Drei Grüße.'.encode('latin-1'),
             'd.png': '\x00\x07', 'e.png': 'x' * 10_000, 'f.png': None, 'g.png': 'Not an image.'}
    for name, text in texts.items():
        p = tmp_path/name
        if name == 'g.png': p.write_bytes(b'nothing')
        else: Image.fromarray(SMOOTH).save(p)
        if text is not None: p.with_suffix('.txt').write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path/'notes.txt').write_text('no picture')
    corpus, aside = folder_corpus(tmp_path, 16)
    assert corpus.captions == ['One.', 'Two lines here.', 'Drei Grüße.'] and corpus.images.shape == (3, 16, 16, 3)
    assert {a.file: a.reason.split(' (')[0] for a in aside} == {'d.png': 'no caption',
            'e.png': 'the caption has 10,000 characters, at most 1,000 are read',
                                                              'f.png': 'no caption', 'g.png': 'not an image'}
    again, _ = folder_corpus(tmp_path, 16, n=2, out=tmp_path/'out')
    assert again.captions == corpus.captions[:2] and (np.asarray(again.images) == corpus.images[:2]).all()
    with pytest.raises(FileNotFoundError, match='no such folder'): folder_corpus(tmp_path/'nowhere', 16)
    (tmp_path/'bad').mkdir()
    Image.fromarray(SMOOTH).save(tmp_path/'bad'/'x.png')
    with pytest.raises(ValueError, match='x.png: no caption'): folder_corpus(tmp_path/'bad', 16)


def test_streamed_head_is_numpys(tmp_path):
    "The head written by hand reads as numpy's for any count; and nothing is left behind by a crash"
    for n in (0, 1, 7):
        corpus, _ = collect(((str(i), saved(Image.fromarray(SMOOTH), format='PNG'), f'{i}.') for i in range(n)), 4,
                            dir=tmp_path/str(n))
        assert np.load(tmp_path/str(n)/'images.npy').shape == (n, 4, 4, 3) == corpus.images.shape
    def dies():
        yield 'a', saved(Image.fromarray(SMOOTH), format='PNG'), 'a.'
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): collect(dies(), 4, dir=tmp_path/'dead')
    assert not list((tmp_path/'dead').iterdir())


def test_coco_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match='captions_train2017'): coco_corpus(tmp_path/'x.json', tmp_path)
    (tmp_path/'x.json').write_text(json.dumps(dict(images=[])))
    with pytest.raises(ValueError, match="table 'annotations'"):
        coco_corpus(tmp_path/'x.json', tmp_path, cache=tmp_path/'c')
    with pytest.raises(ValueError, match="'one' or 'all'"): coco_corpus(tmp_path/'x.json', tmp_path, captions='five')


def test_imagenet_errors(tmp_path):
    from datasets import Dataset
    with pytest.raises(FileNotFoundError, match='validation'): imagenet_enriched_corpus(tmp_path)
    Dataset.from_dict(dict(text=['a'])).to_parquet(tmp_path/'validation-0.parquet')
    with pytest.raises(ValueError, match='caption_enriched'): imagenet_enriched_corpus(tmp_path)


# ---- words

def test_mtld_against_a_plain_reading_of_the_definition():
    def plain(tokens, t=.72):
        def one(ts):
            factors, start = 0., 0
            for i in range(len(ts)):
                part = ts[start:i + 1]
                if len(set(part)) / len(part) < t: factors, start = factors + 1, i + 1
            rest = ts[start:]
            if rest: factors += (1 - len(set(rest)) / len(rest)) / (1 - t)
            return len(ts) / factors if factors else float(len(ts))
        return (one(tokens) + one(tokens[::-1])) / 2
    r = np.random.default_rng(5)
    for _ in range(30):
        tokens = [f'w{k}' for k in r.integers(0, r.integers(2, 60), r.integers(1, 200))]
        assert abs(mtld(tokens) - plain(tokens)) < 1e-9
    assert words("it's 2 o'clock—a well-known T-shirt, isn’t it?") == ["it's", '2', "o'clock", 'a', 'well-known',
                                                                       't-shirt', 'isn’t', 'it']
