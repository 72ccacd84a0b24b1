"""Flags of the published code give exactly the architecture and diffusion process of the published code."""

from typing import Any

import pytest
import torch

from models.diffusion import DiffusionConfig
from models.unet import Architecture, UNetConfig
from models.zoo import MULT_64, MULT_256, ZOO
from orchestrator.weights.flags import Code, parse_flags
from orchestrator.weights.shapes import Shapes, shapes_of

ADM = "--attention_resolutions 32,16,8 --diffusion_steps 1000 --learn_sigma True --resblock_updown True "
ADM += "--use_scale_shift_norm True "
ADM_256 = ADM + "--image_size 256 --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
LSUN = ADM_256 + "--class_cond False --dropout 0.1 --use_fp16 True"
ADM_64 = (
    ADM + "--class_cond True --dropout 0.1 --image_size 64 --noise_schedule cosine --num_channels 192 "
    "--num_head_channels 64 --num_res_blocks 3 --use_new_attention_order True --use_fp16 True"
)
ADM_128 = (
    ADM + "--class_cond True --image_size 128 --noise_schedule linear --num_channels 256 --num_heads 4 "
    "--num_res_blocks 2 --use_fp16 True"
)
UPSAMPLER = (
    "--class_cond True --diffusion_steps 1000 --learn_sigma True --noise_schedule linear --num_channels 192 "
    "--num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True "
)
ID_64 = "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True "
ID_CIFAR = "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3 "
ID_COSINE = "--diffusion_steps 4000 --noise_schedule cosine "
ID_UNSCALED = "--rescale_learned_sigmas False --rescale_timesteps False "
ID_LSUN = (
    "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
    "--use_scale_shift_norm False --attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear "
)
ID: Code = "improved-diffusion"
TRAIN = "--lr 1e-4 --batch_size 128"

# From the README of each repository. The two DDPM models have no flags there; these are flags of improved-diffusion.
PUBLISHED: dict[str, tuple[str, Code | None]] = {
    "adm-64": (ADM_64, None),
    "adm-128": (ADM_128, None),
    "adm-256": (ADM_256 + "--class_cond True --use_fp16 True", None),
    "adm-256-uncond": (ADM_256 + "--class_cond False --use_fp16 True", None),
    "adm-512": (
        ADM + "--class_cond True --image_size 512 --noise_schedule linear --num_channels 256 --num_head_channels 64 "
        "--num_res_blocks 2 --use_fp16 False",
        None,
    ),
    "upsampler-64-256": (
        UPSAMPLER + "--attention_resolutions 32,16,8 --large_size 256  --small_size 64 --num_heads 4",
        None,
    ),
    "upsampler-128-512": (
        UPSAMPLER + "--attention_resolutions 32,16 --large_size 512 --small_size 128 --num_head_channels 64",
        None,
    ),
    "lsun-bedroom": (LSUN, None),
    "lsun-cat": (LSUN, None),
    "lsun-horse": (LSUN, None),
    "lsun-horse-nodropout": (LSUN + " --dropout 0.0", None),
    "classifier-64": (
        ADM_64 + " --classifier_scale 1.0 --classifier_path models/64x64_classifier.pt --classifier_depth 4 "
        "--model_path models/64x64_diffusion.pt --batch_size 4 --num_samples 100 --timestep_respacing 250",
        None,
    ),
    "classifier-128": (
        "--iterations 300000 --anneal_lr True --batch_size 256 --lr 3e-4 --save_interval 10000 --weight_decay 0.05 "
        "--image_size 128 --classifier_attention_resolutions 32,16,8 --classifier_depth 2 --classifier_width 128 "
        "--classifier_pool attention --classifier_resblock_updown True --classifier_use_scale_shift_norm True",
        None,
    ),
    "classifier-256": (ADM_256 + "--class_cond True --use_fp16 True --classifier_scale 1.0", None),
    "classifier-512": ("--image_size 512 --noise_schedule linear --classifier_scale 4.0", None),
    "iddpm-imagenet64": (f"{ID_64}{ID_COSINE}{TRAIN}", ID),
    "iddpm-imagenet64-vlb": (f"{ID_64}{ID_COSINE}--use_kl True {TRAIN} --schedule_sampler loss-second-moment", ID),
    "iddpm-imagenet64-cond": (
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True --class_cond True "
        f"{ID_COSINE}{ID_UNSCALED}--lr 3e-4 --batch_size 2048",
        None,
    ),
    "iddpm-upsampler-64-256": (
        "--num_channels 192 --num_res_blocks 2 --learn_sigma True --class_cond True --diffusion_steps 4000 "
        f"--noise_schedule linear {ID_UNSCALED}--lr 3e-4 --batch_size 256",
        None,
    ),
    "iddpm-cifar10": (f"{ID_CIFAR}{ID_COSINE}{TRAIN}", None),  # only improved-diffusion has 32 pixels
    "iddpm-cifar10-vlb": (f"{ID_CIFAR}{ID_COSINE}--use_kl True {TRAIN}", None),
    "iddpm-lsun-bedroom": (f"{ID_LSUN}{ID_UNSCALED}{TRAIN}", None),
    "iddpm-lsun-bedroom-lr2e-5": (f"{ID_LSUN}{ID_UNSCALED}--use_scale_shift_norm False --lr 2e-5", None),
    "ddpm-cifar10": (
        f"--image_size 32 --num_heads 1 --attention_resolutions 16 --use_scale_shift_norm False --dropout 0.1 "
        f"{ID_UNSCALED}",
        None,
    ),
    "ddpm-256": (
        f"--image_size 256 --num_heads 1 --attention_resolutions 16 --use_scale_shift_norm False --sigma_small True "
        f"{ID_UNSCALED}",
        None,
    ),
}
BASE: Shapes = {"input_blocks.0.0.weight": (128, 3, 3, 3), "output_blocks.0.0.in_layers.0.weight": (1,)}
CONDITIONAL: Shapes = {**BASE, "label_emb.weight": (7, 512)}
UPSAMPLING: Shapes = {**BASE, "input_blocks.0.0.weight": (128, 6, 3, 3)}
CLASSIFIER: Shapes = {"input_blocks.0.0.weight": (128, 3, 3, 3), "out.2.c_proj.weight": (7, 512, 1)}
PLAIN_64 = UNetConfig(image_size=64, out_channels=3, attention_resolutions=(16, 8), resblock_updown=False)
FIXED = DiffusionConfig(variance="fixed_large")

# flags, code, shapes, changes to guided-diffusion's default network, changes to its default diffusion
OTHERS: list[tuple[str, Code | None, Shapes, dict[str, Any], dict[str, Any]]] = [
    ("--lr 1e-4", None, BASE, {}, {}),
    ("--lr 1e-4", ID, BASE, {}, {"rescale_timesteps": True, "loss": "rescaled_simple"}),
    ("--class_cond True", None, CONDITIONAL, {"num_classes": 7}, {}),
    ("--class_cond=1 --use_fp16=no", None, CONDITIONAL, {"num_classes": 7}, {}),
    ("--class_cond False", None, CONDITIONAL, {}, {}),
    ("--class_cond t", None, BASE, {"num_classes": 1000}, {}),
    ("--num_channels 64 --num_channels 96", None, BASE, {"model_channels": 96}, {}),
    ("--num_heads_upsample 2 --num_head_channels -1", None, BASE, {"num_heads_upsample": 2}, {}),
    (
        "--channel_mult 1,2 --attention_resolutions 32,16,8",  # there are maps of 64 and 32 pixels only
        None,
        BASE,
        {"channel_mult": (1, 2), "attention_resolutions": (32,)},
        {},
    ),
    ("--predict_xstart True --use_kl True", None, BASE, {}, {"prediction": "x_start", "loss": "rescaled_kl"}),
    ("--sigma_small 1 " + ID_UNSCALED, None, BASE, {}, {"variance": "fixed_small"}),
    (
        "--diffusion_steps 400 --num_head_channels 32 --learn_sigma True",  # the second flag determines the repository
        None,
        BASE,
        {"num_head_channels": 32, "out_channels": 6},
        {"num_timesteps": 400, "variance": "learned_range"},
    ),
    (
        "--large_size 64 --small_size 16",
        None,
        UPSAMPLING,
        {"image_size": 64, "low_res_size": 16, "channel_mult": MULT_64},
        {},
    ),
    ("--lr 1e-4", None, UPSAMPLING, {"image_size": 256, "low_res_size": 64, "channel_mult": MULT_256}, {}),
]


def shapes(architecture: Architecture) -> Shapes:
    with torch.device("meta"):
        return shapes_of(architecture.build().state_dict())


def test_every_model_of_the_zoo_is_in_the_table() -> None:
    assert PUBLISHED.keys() == ZOO.keys() - {"adm-64-edm"}, "adm-64-edm has the weights of adm-64"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_flags_give_the_entry_of_the_zoo(name: str) -> None:
    text, code = PUBLISHED[name]
    architecture, diffusion = parse_flags(text, code).describe(shapes(ZOO[name].network))
    assert architecture == ZOO[name].network
    assert diffusion == ZOO[name].diffusion


@pytest.mark.parametrize(("text", "code", "file_shapes", "model", "process"), OTHERS)
def test_omitted_flags_have_the_defaults_of_their_repository(
    text: str, code: Code | None, file_shapes: Shapes, model: dict[str, Any], process: dict[str, Any]
) -> None:
    architecture, diffusion = parse_flags(text, code).describe(file_shapes)
    assert architecture == UNetConfig.model_validate(PLAIN_64.model_dump() | model)
    assert diffusion == DiffusionConfig.model_validate(FIXED.model_dump() | process)


def test_a_classifier_takes_its_classes_from_the_file() -> None:
    architecture, _ = parse_flags("--image_size 128").describe(CLASSIFIER)
    assert architecture == ZOO["classifier-128"].network.model_copy(update={"num_classes": 7})


def test_ignored_flags_are_named_once_and_in_order() -> None:
    parsed = parse_flags("--lr 1e-4 --num_channels 64 --data_dir 'my images' --lr 2e-4 --ema_rate 0.999,0.9999")
    assert parsed.ignored == ("lr", "data_dir", "ema_rate") and parsed.given == {"num_channels": 64}


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        ("", None, "empty"),
        ("--num_channel 64", None, "--num_channel;.*--num_channels"),
        ("--num-res-blocks 3", None, "--num-res-blocks;.*--num_res_blocks"),
        ("--learn_sigma", None, "--learn_sigma.*expected one argument"),
        ("--learn_sigma --lr 1", None, "--learn_sigma.*expected one argument"),
        ("--learn_sigma perhaps", None, "--learn_sigma.*perhaps.*True or False"),
        ("--num_channels 64.5", None, "--num_channels.*64.5"),
        ("--attention_resolutions 16;8", None, "--attention_resolutions.*16;8"),
        ("$MODEL_FLAGS --lr 1", None, r"\$MODEL_FLAGS"),
        ("--data_dir 'x", None, "--flags"),
        ("--sigma_small True --resblock_updown True", None, "--resblock_updown.*--sigma_small.*--flags-from"),
    ],
)
def test_flags_that_the_published_scripts_refuse_are_refused(text: str, code: Code | None, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        parse_flags(text, code)


@pytest.mark.parametrize(
    ("text", "code", "file_shapes", "expected"),
    [
        (ID_64 + ID_COSINE, None, BASE, "rescale_timesteps.*rescale_learned_sigmas.*--flags-from"),
        (ID_64 + ID_COSINE + "--rescale_timesteps True", None, BASE, "of rescale_learned_sigmas.*--flags-from"),
        ("--image_size 48", None, BASE, "channel_mult.*48"),
        ("--image_size 128", ID, BASE, "improved-diffusion.*channel_mult.*128"),
        ("--image_size 64", None, UPSAMPLING, "--image_size.*upsampler"),
        ("--large_size 256", None, BASE, "--large_size"),
        ("--noise_schedule sqrt", None, BASE, "--noise_schedule sqrt"),
        ("--num_channels 65", None, BASE, "model_channels=65"),
        ("--sigma_small True", None, CLASSIFIER, "no classifier"),
    ],
)
def test_flags_without_a_valid_network_are_refused(
    text: str, code: Code | None, file_shapes: Shapes, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        parse_flags(text, code).describe(file_shapes)
