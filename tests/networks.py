"""The networks on which surgery is tried, chosen before it was rewritten, with a small input for each.

`NETWORKS` maps a name to a constructor, the class of the activation to swap, and what makes a batch. Weights
are random: nothing is downloaded. `python tests/networks.py [NAME ...]` prints a line of JSON for each.
"""
from __future__ import annotations

import copy
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from wib_nbdev.activations import WIBReLU
from wib_nbdev.surgery import calibrate, diagnose, fold_shift, swap_activations


class Network(NamedTuple):
    "One network of the list."
    package: str  # what has to be installed
    make: Callable[[], nn.Module]  # with random weights
    old: type[nn.Module]  # the activation that it mostly uses
    batch: Callable[[], Any]  # as `calibrate` and `fold_shift` take it


def images(n: int, side: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(0))


def image_list(side: int) -> tuple[list[torch.Tensor]]:
    "One argument: a list of images of different sizes, as torchvision's detectors take them."
    return ([images(1, side)[0], images(1, side + 32)[0]],)


def tokens(n_words: int, *names: str) -> dict[str, torch.Tensor]:
    "The same random words under each of the names."
    words = torch.randint(0, n_words, (2, 12), generator=torch.Generator().manual_seed(0))
    return {name: words for name in names}


def torchvision(name: str, family: str = '', **options: Any) -> nn.Module:
    import torchvision
    place = getattr(torchvision.models, family) if family else torchvision.models
    return getattr(place, name)(weights=None, **options)


def retinanet(**options: Any) -> nn.Module:
    """Untrained, all of its boxes have nearly the same score: the rounding of the processor would decide
    which come first, and so the output. Hence larger weights, and few boxes."""
    model = torchvision('retinanet_resnet50_fpn', 'detection', **options)
    with torch.no_grad(): model.head.classification_head.cls_logits.weight.mul_(100)
    return model


def timm(name: str) -> nn.Module:
    import timm
    return timm.create_model(name, pretrained=False)


def hugging_face(model: str, config: str, **options: Any) -> nn.Module:
    import transformers
    return getattr(transformers, model)(getattr(transformers, config)(**options))


NETWORKS: dict[str, Network] = {}

# One of each of torchvision's families for classification, two where a variant is built differently.
_OPTIONS: dict[str, Any] = dict(googlenet=dict(init_weights=False), inception_v3=dict(init_weights=False))
_BY_ACTIVATION: dict[type[nn.Module], dict[str, int]] = {  # the side of the images of each
    nn.ReLU: dict(alexnet=64, densenet121=32, googlenet=64, inception_v3=75, mnasnet0_5=32, regnet_y_400mf=32,
                  resnet18=64, resnet50=64, resnext50_32x4d=64, shufflenet_v2_x0_5=64, squeezenet1_1=64,
                  vgg11=32, vgg11_bn=32, wide_resnet50_2=64),
    nn.ReLU6: dict(mobilenet_v2=32), nn.Hardswish: dict(mobilenet_v3_small=32),
    nn.SiLU: dict(efficientnet_b0=32, efficientnet_v2_s=32),
    nn.GELU: dict(convnext_tiny=32, maxvit_t=224, swin_t=32, vit_b_32=224)}
for _old, _sides in _BY_ACTIVATION.items():
    for _name, _side in _sides.items():
        NETWORKS[_name] = Network(
            'torchvision', partial(torchvision, _name, **_OPTIONS.get(_name, {})), _old,
            partial(images, 4, _side))

# Three detectors: two stages, one stage with feature pyramids, and a VGG without normalisation.
_SMALL = dict(min_size=96, max_size=128)
_faster_rcnn = partial(torchvision, 'fasterrcnn_resnet50_fpn', 'detection', box_score_thresh=0.0, **_SMALL)
_ssd = partial(torchvision, 'ssd300_vgg16', 'detection', score_thresh=0.0, topk_candidates=1,
               detections_per_img=10)  # few boxes, for the same reason
_retinanet = partial(retinanet, score_thresh=0.0, topk_candidates=10, **_SMALL)
for _name, _make in dict(fasterrcnn_resnet50_fpn=_faster_rcnn, ssd300_vgg16=_ssd,
                         retinanet_resnet50_fpn=_retinanet).items():
    NETWORKS[_name] = Network('torchvision', partial(_make, weights_backbone=None), nn.ReLU,
                              partial(image_list, 96))

# Two for segmentation.
for _name in ('fcn_resnet50', 'deeplabv3_mobilenet_v3_large'):
    NETWORKS[_name] = Network(
        'torchvision', partial(torchvision, _name, 'segmentation', weights_backbone=None), nn.ReLU,
        partial(images, 2, 64))

# Ten of timm that differ in kind: an activation inside a norm, dense and pre-activated blocks, standardised
# weights, no norm at all, branches that exchange resolutions, branches that are summed, attention over
# kernels, and three without ReLU.
for _name, _old, _side in (
        ('regnety_002', nn.ReLU, 64), ('densenet121', nn.ReLU, 64), ('resnetv2_50x1_bit', nn.ReLU, 64),
        ('nf_resnet26', nn.ReLU, 64), ('hrnet_w18_small', nn.ReLU, 64), ('repvgg_a0', nn.ReLU, 64),
        ('skresnet18', nn.ReLU, 64), ('convnext_atto', nn.GELU, 64), ('vit_tiny_patch16_224', nn.GELU, 224),
        ('mobilenetv3_small_050', nn.Hardswish, 64)):
    NETWORKS[f'timm {_name}'] = Network('timm', partial(timm, _name), _old, partial(images, 4, _side))

# Four of Hugging Face: an encoder, an encoder with a decoder, a decoder, and a convolutional network.
_HUGGING_FACE: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    'Bert': (dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
                  intermediate_size=64, hidden_act='relu'), partial(tokens, 50, 'input_ids')),
    'T5': (dict(vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=3, num_heads=2,
                feed_forward_proj='relu'), partial(tokens, 50, 'input_ids', 'decoder_input_ids')),
    'OPT': (dict(vocab_size=50, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=3,
                 num_attention_heads=2, ffn_dim=64), partial(tokens, 50, 'input_ids')),
    'ResNet': (dict(embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[2, 2, 2, 2]),
               partial(images, 4, 64))}
for _name, (_config, _batch) in _HUGGING_FACE.items():
    NETWORKS[f'hf {_name}'] = Network(
        'transformers', partial(hugging_face, f'{_name}Model', f'{_name}Config', **_config), nn.ReLU, _batch)


def run(model: nn.Module, batch: Any) -> Any:
    "The model on a batch: a tensor, a tuple of arguments, or named ones."
    if isinstance(batch, dict): return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def tensors(output: Any) -> list[torch.Tensor]:
    "The floating tensors that a model puts out."
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def reasons(notes: Any) -> str:
    "How often each reason is given, without the names in it."
    short = Counter(re.split(r', by |; |: its class| which', note)[0] for note in notes)
    return '; '.join(f'{n} {note}' for note, n in short.items())


@torch.no_grad()
def measure(name: str) -> dict[str, Any]:
    "What surgery does to a network, every zero-initialised parameter of which is made random first."
    network = NETWORKS[name]
    torch.manual_seed(0)
    model, batch = network.make(), network.batch()
    for parameter in model.parameters():
        if not parameter.any(): parameter.normal_(0, 0.1)
    expected = tensors(run(copy.deepcopy(model).eval(), batch))
    report = swap_activations(model, network.old)
    plain = copy.deepcopy(model).eval()
    for module in plain.modules():
        if isinstance(module, WIBReLU): module.shift.zero_()
    same = all(map(torch.equal, tensors(run(plain, batch)), expected)) if network.old is nn.ReLU else None
    calibrated = calibrate(model, batch)
    frame = diagnose(model, batch)
    units = frame[frame['type'] == 'WIBReLU']
    before = tensors(run(model.eval(), batch))
    folded = fold_shift(model, batch)
    after = tensors(run(model, batch))
    scale = max(tensor.abs().max().item() for tensor in before if tensor.numel())
    error = max((a - b).abs().max().item() for a, b in zip(after, before, strict=True) if a.numel()) / scale
    left = calibrated[calibrated['shift'].isna()]
    noted = calibrated[calibrated['shift'].notna() & (calibrated['note'] != '')]
    return {'network': name, 'swapped': network.old.__name__, 'places': len(report),
            'not swapped': reasons(report.loc[~report['swapped'], 'note']), 'same function': same,
            'ReLUs left': reasons(left['note']), 'largest mean': (units['mean'].abs() / units['std']).max(),
            'notes': reasons(noted['note']),
            'folded': f"{folded['folded'].sum()} of {len(folded)}",
            'not folded': reasons(folded.loc[~folded['folded'], 'note']), 'error': error}


if __name__ == '__main__':
    for name in sys.argv[1:] or NETWORKS: print(json.dumps(measure(name)), flush=True)
