"torchvision: of each kind of classifier the smallest, and segmentation, detection, video and optical flow."

from __future__ import annotations

import re
from functools import partial

import torch
import torchvision.models as tv

from .architecture import Architecture, Built
from .inputs import clips, crops, noise

LARGER = [  # siblings of what is tried
    "convnext_small",
    "convnext_base",
    "convnext_large",
    "densenet161",
    "densenet169",
    "densenet201",
    "mnasnet0_75",
    "mnasnet1_0",
    "mnasnet1_3",
    "mobilenet_v3_large",
    "resnet34",
    "resnet101",
    "resnet152",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0",
    "swin_b",
    "swin_s",
    "swin_v2_b",
    "swin_v2_s",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "vit_b_16",
    "vit_h_14",
    "vit_l_16",
    "vit_l_32",
    "wide_resnet101_2",
    "efficientnet_v2_m",
    "efficientnet_v2_l",
    "squeezenet1_0",
    "fcn_resnet101",
    "deeplabv3_resnet101",
    "swin3d_s",
    "swin3d_b",
    "raft_large",
]
LARGER += [f"efficientnet_b{i}" for i in range(1, 8)]
KIND = {"segmentation": tv.segmentation, "detection": tv.detection, "video": tv.video, "optical flow": tv.optical_flow}
SIDE = {"alexnet": 128, "inception_v3": 128, "maxvit_t": 224}  # of the image; others: 96
FRAMES_AND_SIDE = {"mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224), "s3d": (16, 224)}


def architectures():
    for name in listed(tv):
        yield Architecture("torchvision", name, partial(classifier, name))
    for kind, module in KIND.items():
        for name in listed(module):
            yield Architecture(f"torchvision {kind}", name, partial(BUILD[kind], name))


def listed(module):
    return [n for n in tv.list_models(module=module) if n not in LARGER and not re.fullmatch(r"regnet_._[^4].*", n)]


def made(name, **kwargs):
    torch.manual_seed(0)
    return tv.get_model(name, weights=None, **kwargs)


def classifier(name):
    side = SIDE.get(name, 96)
    kwargs = {"image_size": side} if name.startswith("vit") else {}
    if name in ("googlenet", "inception_v3"):
        kwargs["init_weights"] = True
    return Built(made(name, **kwargs), crops(side=side), f"{side} px")


def segmentation(name):
    return Built(made(name, weights_backbone=None), crops(side=96), "96 px")


def detection(name):
    "A list of images of different sizes, as detectors take them; made small again by their own transform."
    kwargs = {} if name.startswith("ssd") else {"min_size": 128, "max_size": 192}
    if "rcnn" in name:
        kwargs |= {"rpn_post_nms_top_n_test": 64, "box_detections_per_img": 16}
    model = made(name, weights_backbone=None, **kwargs)
    images = [crops(1, side=128, seed=i)[0] for i in range(2)] + [crops(1, side=160, height=128, seed=3)[0]]
    return Built(model, (images,), "3 images")


def video(name):
    frames, side = FRAMES_AND_SIDE.get(name, (16, 64))
    return Built(made(name), clips(frames=frames, side=side), f"{frames} frames, {side} px")


def optical_flow(name):
    return Built(made(name), (crops(2, side=128), crops(2, side=128) + 0.1 * noise(2, 3, 128, 128)), "128 px")


BUILD = {"segmentation": segmentation, "detection": detection, "video": video, "optical flow": optical_flow}
