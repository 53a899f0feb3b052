"""DESIGN section 8: imports run downwards only, and the rooms of the algorithm know nothing of fastai."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastai_lsuv

PACKAGE = Path(fastai_lsuv.__file__).parent
ORDER = ['errors', 'stats', 'ranks', 'modules', 'options', 'init', 'probe', 'hooks', 'rehearsal', 'units', 'survey', 'branches', 'solver', 'step', 'block', 'correction',
         'figure', 'plots', 'activation_curves', 'activation_maps', 'report', 'lsuv', 'loop', 'evidence', 'effects', 'replay', 'batch', 'callback',
         'sampling', 'capture', 'history', 'reading', 'logs', 'recorder', 'demo']
NO_FASTAI = [*ORDER[:ORDER.index('correction') + 1], 'lsuv', 'sampling', 'capture', 'history']
ROOMS = sorted(p.stem for p in PACKAGE.glob('*.py') if not p.stem.startswith('__'))


def imports(room):
    "Names of the modules that a room imports, wherever in its text; those under TYPE_CHECKING are for the type checker only."
    tree = ast.parse((PACKAGE / f'{room}.py').read_text(encoding='utf-8'))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test): node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, ['fastai_lsuv' if node.level else '', node.module or '']))
            yield base
            if base == 'fastai_lsuv': yield from (f'{base}.{a.name}' for a in node.names)


def test_every_room_has_its_place(): assert set(ROOMS) == set(ORDER)


@pytest.mark.parametrize('room', ROOMS)
def test_imports_run_downwards(room):
    ours = {name.split('.')[1] for name in imports(room) if name.startswith('fastai_lsuv.')}
    above = set(ORDER[ORDER.index(room):])
    assert not ours & above, f'{room} imports {ours & above}'


@pytest.mark.parametrize('room', NO_FASTAI)
def test_the_algorithm_imports_no_fastai(room):
    assert not {name for name in imports(room) if name.split('.')[0] in ('fastai', 'fastcore')}


@pytest.mark.parametrize('room', ['figure', 'plots', 'activation_curves', 'activation_maps'])
def test_figures_know_of_frames_only(room):
    assert {n for n in imports(room) if n.startswith('fastai_lsuv')} <= {'fastai_lsuv.figure'}


def test_importing_says_nothing_and_leaves_the_plotting_backend_alone():
    code = ('import warnings; warnings.simplefilter("error", UserWarning); import fastai.vision.all, matplotlib; '
            'import torch, random; before = random.getstate(), torch.get_rng_state().tolist(), matplotlib.get_backend(); '
            'import fastai_lsuv; '
            'assert before == (random.getstate(), torch.get_rng_state().tolist(), matplotlib.get_backend())')
    done = subprocess.run([sys.executable, '-c', code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ''), done.stderr
    assert 'fastai_lsuv' not in done.stderr


def test_nothing_but_fastai_and_torch_is_needed():
    extras = ('accelerate', 'wandb', 'tensorboard', 'timm', 'transformers', 'pytest', 'hypothesis', 'accelerate.utils')
    code = f'import sys; sys.modules.update(dict.fromkeys({extras})); import fastai_lsuv, fastai_lsuv.demo, fastai_lsuv.init'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
