"""Pretrained models: tiny checkpoints of the real architectures, in the hub's format, by path."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cli
import estimates
import order
import pretrained
import runs
from checkpoints import export_policy, exported_policy, load_part, save_part, used
from fit import FitConfig, fit
from instructions import INSTRUCTIONS
from policy import Policy, PolicyConfig, to_float
from ppo import LoopConfig, Rollouts, chunk_log_prob, update
from pretrained import FINGERPRINT, BadCheckpoint, PretrainedConfig, PretrainedVLM, check
from reflector import Reflector, ReflectorConfig, stack_frames
from tasks import ACTION_DIM, STATE_DIM
from vlm import tokenize, words

SIZE, CHUNK, WIDTH = 32, 3, 32
FAMILIES = tuple(pretrained.FAMILIES)
SPECIAL = (
    "<pad>", "<unk>", "<s>", "</s>", "<image>", "<|image_pad|>", "<|vision_start|>",
    "<|vision_end|>", "<fake_token_around_image>", "<global-img>", "<|im_start|>", "<|im_end|>",
    "<end_of_utterance>", "<start_of_image>", "<end_of_image>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip


# ------------------------------------------------------------------------------- tiny checkpoints


def tiny_tokenizer(without: str = ""):
    """Whole words: those of the instructions and of our prompts; and the families' special ones but
    one, in whose place an ordinary word stands."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [text for texts in INSTRUCTIONS.values() for text in texts]
    texts.append("What action should the robot take to? picture of first previous current Has it")
    known = sorted({word for text in texts for word in re.findall(r"\w+|\?", text)})
    special = ["ordinary" if word == without else word for word in SPECIAL]
    vocabulary = {word: number for number, word in enumerate((*special, *known))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
        eos_token="</s>", additional_special_tokens=[w for w in special[4:] if w != "ordinary"],
    )  # fmt: skip


def tiny_model(family: str, vocabulary: dict[str, int]):
    """The family's own class with random weights: two layers of width 32."""
    import transformers as hf

    text = {
        "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(vocabulary),
        "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    image = vocabulary["<image>"]
    qwen = {
        "text_config": text | {"rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        "image_token_id": vocabulary["<|image_pad|>"],
        "vision_start_token_id": vocabulary["<|vision_start|>"],
        "vision_end_token_id": vocabulary["<|vision_end|>"],
    }  # fmt: skip
    if family in ("smolvlm", "idefics3"):
        name = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[family]
        config = getattr(hf, f"{name}Config")(
            text_config={"model_type": "llama", **text}, vision_config=vision, scale_factor=2,
            image_token_id=image,
        )  # fmt: skip
        return getattr(hf, f"{name}ForConditionalGeneration")(config)
    if family == "qwen2_vl":
        eyes = {"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 4,
                "mlp_ratio": 2, "patch_size": 4}  # fmt: skip
        return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(vision_config=eyes, **qwen))
    if family == "qwen2_5_vl":
        eyes = {"depth": 2, "hidden_size": WIDTH, "out_hidden_size": WIDTH, "num_heads": 4,
                "intermediate_size": 64, "patch_size": 4, "window_size": 16,
                "fullatt_block_indexes": [1]}  # fmt: skip
        config = hf.Qwen2_5_VLConfig(vision_config=eyes, **qwen)
        return hf.Qwen2_5_VLForConditionalGeneration(config)
    if family == "qwen3_vl":
        eyes = {"depth": 2, "hidden_size": WIDTH, "out_hidden_size": WIDTH, "num_heads": 4,
                "intermediate_size": 64, "patch_size": 4, "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0]}  # fmt: skip
        qwen["text_config"] |= {"head_dim": 8}
        return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(vision_config=eyes, **qwen))
    if family == "paligemma":
        eyes = {"model_type": "siglip_vision_model", **vision, "projection_dim": WIDTH,
                "vision_use_head": False}  # fmt: skip
        words = {"model_type": "gemma", "head_dim": 8, **text}
        return hf.PaliGemmaForConditionalGeneration(
            hf.PaliGemmaConfig(
                text_config=words, vision_config=eyes, image_token_index=image, projection_dim=WIDTH
            )
        )
    if family == "gemma3":
        eyes = {"model_type": "siglip_vision_model", **vision, "vision_use_head": False}
        layers = ["sliding_attention", "full_attention"]
        words = {"head_dim": 8, "sliding_window": 16, "layer_types": layers, **text}
        config = hf.Gemma3Config(
            text_config=words, vision_config=eyes, mm_tokens_per_image=4, image_token_id=image,
        )  # fmt: skip
        return hf.Gemma3ForConditionalGeneration(config)
    eyes = {"model_type": "clip_vision_model", **vision}
    if family == "llava_next":
        return hf.LlavaNextForConditionalGeneration(
            hf.LlavaNextConfig(
                text_config={"model_type": "llama", **text}, vision_config=eyes,
                image_token_index=image, image_grid_pinpoints=[[32, 64], [64, 32]],
            )
        )  # fmt: skip
    if family == "vipllava":
        return hf.VipLlavaForConditionalGeneration(
            hf.VipLlavaConfig(
                text_config={"model_type": "llama", **text}, vision_config=eyes,
                image_token_index=image, vision_feature_layers=[-2, -1],
            )
        )  # fmt: skip
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config={"model_type": "llama", **text}, vision_config=eyes, image_token_index=image
        )
    )


def save_tiny(folder, family: str) -> None:
    """A checkpoint as the hub has it: config.json, model.safetensors, tokenizer, processor."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    model = tiny_model(family, tokenizer.get_vocab())
    # Untrained language models of this size hardly look at their prompt.
    for name, weight in model.named_parameters():
        if "layers" in name and "proj" in name:
            weight.data *= 5
        if name.endswith("mm_input_projection_weight"):  # Gemma 3's begins at 0
            weight.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.3, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{family: folder}."""
    root = tmp_path_factory.mktemp("hub")
    folders = {family: root / family for family in FAMILIES}
    for family, folder in folders.items():
        folder.mkdir()
        save_tiny(folder, family)
    return folders


@pytest.fixture(params=FAMILIES)
def checkpoint(request, checkpoints):
    """The folder of each family in turn."""
    return checkpoints[request.param]


def large(folder, rank: int = 0, bf16: bool = False) -> PretrainedConfig:
    """In float32, so that sums in another order do not blur a comparison."""
    return PretrainedConfig(checkpoint=str(folder), lora_rank=rank, bf16=bf16)


def vla(folder, rank: int = 4, seed: int = 0, **settings) -> Policy:
    """A policy on a tiny checkpoint; needs peft."""
    pytest.importorskip("peft", reason="peft is in requirements-gpu.txt")
    torch.manual_seed(seed)
    model = replace(large(folder, rank), **settings)
    return Policy(
        PolicyConfig(backbone="pretrained", size=SIZE, chunk=CHUNK, hidden=32, pretrained=model)
    )


def moved(policy: Policy) -> Policy:
    """With adapters and heads that do something: LoRA's B and the scale head begin at 0."""
    torch.manual_seed(1)
    for name, weight in policy.named_parameters():
        if "lora_B" in name or "scale_head" in name:
            weight.data.normal_(0, 0.1)
    return policy


def scripted_batch(rows: int = 4) -> dict[str, torch.Tensor]:
    """Rows that differ in everything, words of different lengths among it."""
    generator = torch.Generator().manual_seed(0)
    texts = [INSTRUCTIONS[task][0] for task in list(INSTRUCTIONS)[:rows]]
    assert len({len(text.split()) for text in texts}) > 1
    return {
        "image": torch.randint(0, 256, (rows, SIZE, SIZE, 3), generator=generator).to(torch.uint8),
        "state": torch.randn(rows, STATE_DIM, generator=generator),
        "tokens": tokenize(texts),
        "action": 1.8 * torch.rand(rows, CHUNK, ACTION_DIM, generator=generator) - 0.9,
    }


def answer(policy: Policy, batch: dict, rows=slice(None)) -> torch.Tensor:
    """Mean and log-scale side by side, without gradient."""
    inputs = (to_float(batch["image"][rows]), batch["state"][rows], batch["tokens"][rows])
    with torch.no_grad():
        return torch.cat(policy.distribution(*inputs), dim=-1)


# ------------------------------------------------------------------------------ pictures and words


def test_same_as_the_models_own_forward(checkpoint):
    """Placing image tokens ourselves gives what the model does with ids and pixels: two pictures
    in a prompt, rows of different lengths. Tokens behind a prompt change it only where the family
    lets it see them."""
    vlm = PretrainedVLM(large(checkpoint)).eval()
    pictures, texts = torch.rand(2, 2, 3, SIZE, SIZE) - 0.5, ["open the drawer", "close it"]
    ids, mask = vlm.prompts(texts, pictures=2)
    inputs = vlm.inputs(pictures)
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == vlm.base.config.image_token_id).int()
    elif vlm.family.inputs is pretrained.one_tile:  # a row's pictures are its tiles
        inputs["pixel_values"] = inputs["pixel_values"].view(
            2, 2, *inputs["pixel_values"].shape[2:]
        )
    if vlm.model.config.model_type == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(ids)
    if vlm.model.config.model_type == "gemma3":
        inputs["token_type_ids"] = (ids == vlm.base.config.image_token_id).long()
    with torch.no_grad():
        own = vlm.base(input_ids=ids, attention_mask=mask, **inputs).last_hidden_state
        ours = vlm(pictures, texts)
        longer = vlm(pictures, texts, torch.randn(2, 3, WIDTH))[:, :-3]
    assert (ids == vlm.base.config.image_token_id).sum() == 4 * vlm.image_tokens
    kept = mask.bool()
    assert not kept.all() and kept[:, -1].all()
    assert torch.allclose(ours[kept], own[kept], atol=1e-5)
    unseen = torch.allclose(longer[kept], ours[kept], atol=1e-5)
    assert unseen == (vlm.model.config.model_type != "paligemma")


def test_gemmas_image_tokens_see_each_other(checkpoints):
    """A change in the last of a picture reaches its first, and not what stands before it."""
    vlm = PretrainedVLM(large(checkpoints["gemma3"])).eval()
    pictures, texts = torch.rand(1, 2, 3, SIZE, SIZE) - 0.5, ["open the drawer"]
    ids, _ = vlm.prompts(texts, pictures=2)
    (second,) = (ids[0] == vlm.base.config.image_token_id).nonzero()[vlm.image_tokens]
    features = vlm.base.get_image_features

    def changed(**inputs):
        seen = features(**inputs)
        seen.pooler_output = seen.pooler_output.clone()
        seen.pooler_output[1, -1] += 1
        return seen

    with torch.no_grad():
        before = vlm(pictures, texts)[0]
        vlm.base.get_image_features = changed
        difference = (vlm(pictures, texts)[0] - before).abs().amax(-1)
    assert difference[second] > 1e-3 and difference[:second].max() < 1e-5


QWENS = (
    "<|im_start|>user\n" + 2 * "<|vision_start|>II<|vision_end|>" + "open it<|im_end|>\n"
    "<|im_start|>assistant\n"
)
SMOLVLMS = (
    "User:"
    + 2 * "<fake_token_around_image><global-img>II<fake_token_around_image>"
    + "open it<end_of_utterance>\nAssistant:"
)
PROMPTS = {
    "smolvlm": "<|im_start|>" + SMOLVLMS,
    "idefics3": "<s>" + SMOLVLMS,
    "qwen2_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + QWENS,
    "qwen2_5_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + QWENS,
    "qwen3_vl": QWENS,
    "paligemma": "IIII<s>open it\n",
    "gemma3": "<s><start_of_turn>user\n" + 2 * "\n\n<start_of_image>II<end_of_image>\n\n"
    + "open it<end_of_turn>\n<start_of_turn>model\n",
    "llava": "<s>USER: II\nII\nopen it ASSISTANT:",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_the_chat_templates(family):
    """Two pictures of two tokens each, as the family's processor and chat template write them."""
    assert pretrained.FAMILIES[family].write("open it", 2, "II", "<s>") == PROMPTS[family]


def test_one_picture_of_llava():
    """A newline behind it, as before."""
    text = pretrained.FAMILIES["llava"].write("open it", 1, "II", "<s>")
    assert text == "<s>USER: II\nopen it ASSISTANT:"


def test_qwens_patches_are_those_of_its_processor(checkpoints):
    """In order and value, for two pictures of the size that needs no resizing."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    vlm = PretrainedVLM(large(checkpoints["qwen2_vl"]))
    side = 8 * 4 * 2  # tokens, pixels of a patch, patches merged
    frames = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, do_resize=False,
        image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.3, 0.25],
    )  # fmt: skip
    theirs = processor(list(frames), return_tensors="pt")
    ours = vlm.inputs(to_float(torch.from_numpy(frames))[:, None])
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    assert torch.allclose(ours["pixel_values"], theirs["pixel_values"], atol=1e-5)


def test_words_come_back_from_tokens():
    """Every instruction, but for capitals and punctuation."""
    for wordings in INSTRUCTIONS.values():
        plain = [" ".join(re.findall(r"[a-z]+", text.lower())) for text in wordings]
        assert words(tokenize(wordings)) == plain


def test_statistics_stand_in_either_file(tmp_path):
    """Older processors have a file of their own, newer ones are part of processor_config.json. What
    neither tells is a half."""
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": statistics}))
    mean, std = pretrained.picture_statistics(tmp_path)
    assert mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3]) and std.shape == (3, 1, 1)
    (tmp_path / "processor_config.json").write_text("{}")
    assert all((x == 0.5).all() for x in pretrained.picture_statistics(tmp_path))


# -------------------------------------------------------------------------------------- the policy


def test_policy_answers_and_reads_everything(checkpoint):
    """Shapes, ranges; image, words and state all matter; a row does not see its neighbours."""
    policy, batch = moved(vla(checkpoint)).eval(), scripted_batch()
    out = answer(policy, batch)
    assert out.shape == (4, CHUNK, 2 * ACTION_DIM) and out.isfinite().all()
    assert out[..., :ACTION_DIM].abs().max() < 1.2
    assert torch.allclose(out[1:2], answer(policy, batch, slice(1, 2)), atol=1e-4)
    for name in ("image", "tokens", "state"):
        other = batch | {name: batch[name].roll(1, 0)}
        assert (answer(policy, other) - out).abs().max() > 1e-4, name
    steps = out[0, :, :ACTION_DIM]
    assert (steps[0] - steps[1]).abs().max() > 1e-4  # each has placeholders of its own


def test_only_adapters_and_heads_are_trained(checkpoint):
    """Gradients there and nowhere else; nothing changes before the first step of LoRA's B."""
    policy, batch = vla(checkpoint), scripted_batch()
    plain = vla(checkpoint, rank=0)
    plain.load_state_dict({k: v for k, v in policy.state_dict().items() if "lora_" not in k})
    assert torch.allclose(answer(policy.eval(), batch), answer(plain.eval(), batch), atol=1e-5)
    moved(policy)(batch)[0].backward()
    for name, weight in policy.named_parameters():
        large_one = name.startswith("backbone.vlm.")
        assert weight.requires_grad == (not large_one or "lora_" in name), name
        assert weight.requires_grad or weight.grad is None
    touched = {n for n, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    for part in ("language_model", "text_model"):
        if any(part in name for name in dict(policy.named_parameters())):
            assert any(part in name and "lora_A" in name for name in touched)
    vision = [n for n in touched if "vis" in n and "lora_B" in n]
    assert vision, "the vision encoder has adapters as well"
    for head in ("backbone.placeholders", "backbone.state_token.0.weight", "mean_head.weight"):
        assert head in touched
    assert not any("lm_head" in name and "lora_" in name for name in touched)


def test_imitation_loss_falls(checkpoint):
    """Twenty steps on one batch, by the loop that trains everything."""
    policy, batch = vla(checkpoint), scripted_batch()
    policy.shift = 0
    before = {n: p.clone() for n, p in policy.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        first = policy(batch)[1]["l1"]
    fit(policy, lambda step: batch, FitConfig(steps=20, learning_rate=1e-2, warmup=1))
    with torch.no_grad():
        assert policy(batch)[1]["l1"] < 0.7 * first
    for name, weight in policy.named_parameters():
        assert name not in before or torch.equal(weight, before[name])


def scripted_rollouts(policy: Policy, rows: int = 4) -> Rollouts:
    """Two groups of two, one decision each, drawn from the policy; one of each group wins."""
    batch = scripted_batch(rows)
    out = answer(policy, batch)
    mean, log_scale = out.split(ACTION_DIM, dim=-1)
    sample = mean + 0.1 * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    return Rollouts(
        image=batch["image"].numpy(), state=batch["state"].numpy(), tokens=batch["tokens"],
        sample=sample, log_prob=chunk_log_prob(sample, mean, log_scale, shared=False),
        member=np.arange(rows), decision=np.zeros(rows, np.int64),
        returns=np.array([[1, 0], [0, 1]], np.float32),
        success=np.array([[1, 0], [0, 1]], bool), mean_success=math.nan, decisions=rows,
    )  # fmt: skip


def test_ppo_step(checkpoint):
    """First ratio 1; LoRA and heads move, each by its own rate; what is frozen stays."""
    policy = moved(vla(checkpoint)).eval()
    config = LoopConfig(
        branch=0, noise=1.0, epochs=1, learning_rate=1e-5, adapter_rate=1e-4, rollouts=2
    )
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    optimizer = torch.optim.Adam(policy.parameter_groups(config.learning_rate, config.adapter_rate))
    generator = torch.Generator().manual_seed(0)
    metrics = update(policy, optimizer, scripted_rollouts(policy), config, generator)
    assert metrics["first_ratio"] == pytest.approx(1.0, abs=1e-4)
    steps = {n: (p - before[n]).abs().max().item() for n, p in policy.named_parameters()}
    # Adam's first step has the size of the rate.
    assert steps["mean_head.weight"] == pytest.approx(1e-5, rel=0.05)
    adapters = [step for name, step in steps.items() if "lora_" in name]
    assert max(adapters) == pytest.approx(1e-4, rel=0.05)
    assert all(step == 0 for name, step in steps.items() if ".vlm." in name and "lora_" not in name)


def test_a_small_policy_has_one_group_of_all_parameters():
    """So its optimizer is the one it always had."""
    policy = Policy(PolicyConfig(size=SIZE, width=8, hidden=32))
    (group,) = policy.parameter_groups(4e-5, 1.0)
    assert group["lr"] == 4e-5
    assert [id(p) for p in group["params"]] == [id(p) for p in policy.parameters()]


def test_gradient_checkpointing_computes_layers_again(checkpoint):
    """Also in evaluation mode, which is PPO's: two forwards of a layer's inside for one gradient,
    and the same gradient as without."""
    gradients, calls = [], []
    for on in (True, False):
        policy = moved(vla(checkpoint, gradient_checkpointing=on)).eval()
        count = []
        inside = [m for n, m in policy.named_modules() if n.endswith("layers.0.mlp")]
        inside[-1].register_forward_pre_hook(lambda *_, count=count: count.append(1))
        policy(scripted_batch())[0].backward()
        words = policy.backbone.vlm.model.get_input_embeddings()
        assert not words._forward_hooks  # frozen words need no gradient
        calls.append(len(count))
        gradients.append(policy.backbone.placeholders.grad)
    assert calls == [2, 1]
    assert torch.allclose(*gradients, atol=1e-6)


def test_bfloat16(checkpoint):
    """Frozen weights in half the bytes, adapters in float32, the answer nearly the same."""
    policy, half = moved(vla(checkpoint)), vla(checkpoint, bf16=True).eval()
    half.load_state_dict(policy.state_dict())
    kinds = {"lora_" in n: p.dtype for n, p in half.backbone.vlm.named_parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    batch = scripted_batch()
    full, out = answer(policy.eval(), batch), answer(half, batch)
    assert out.dtype == torch.float32
    assert (out - full).abs().max() < 0.2 * full.abs().max()
    half(batch)[0].backward()
    assert half.mean_head.weight.grad.isfinite().all()


# ------------------------------------------------------------------------------- saving and loading


def test_saved_are_adapters_and_heads(checkpoint, tmp_path):
    """The file names the model and does not hold it; loaded, it answers the same."""
    policy, batch = moved(vla(checkpoint)).eval(), scripted_batch()
    path = tmp_path / "policy.safetensors"
    save_part(path, policy, asdict(policy.config))
    for name in policy.state_dict():
        assert not name.startswith("backbone.vlm.") or "lora_" in name or FINGERPRINT in name
    again = vla(checkpoint, seed=7)
    assert not torch.allclose(answer(again.eval(), batch), answer(policy, batch), atol=1e-3)
    load_part(path, again, asdict(again.config))
    assert torch.equal(answer(again, batch), answer(policy, batch))
    other = replace(policy.config, pretrained=large(checkpoint, rank=2))
    with pytest.raises(runs.BadRun, match="lora_rank: saved 4, expected 2"):
        load_part(path, again, asdict(other))


@pytest.mark.parametrize("rank", [0, 4])
def test_other_frozen_weights_are_refused(damaged, tmp_path, rank):
    """As of a later revision of the same id: adapters and heads mean nothing there."""
    policy, path = vla(damaged, rank), tmp_path / "policy.safetensors"
    save_part(path, policy, asdict(policy.config))
    load_part(path, vla(damaged, rank, seed=7), asdict(policy.config))
    spoil(damaged, lambda weights, name: weights[name].neg_())
    with pytest.raises(runs.BadRun, match="safetensors: the frozen weights are not"):
        load_part(path, vla(damaged, rank), asdict(policy.config))


def test_merged_answers_as_before(checkpoint, tmp_path):
    """A full checkpoint: no adapters, no peft, the same answers, wherever it is moved."""
    policy, batch = moved(vla(checkpoint)).eval(), scripted_batch()
    before = answer(policy, batch)
    export_policy(policy, tmp_path / "merged")
    assert torch.equal(answer(policy, batch), before)  # the policy itself stays as it was
    (tmp_path / "merged").rename(tmp_path / "elsewhere")
    merged = exported_policy(tmp_path / "elsewhere")
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    assert torch.allclose(answer(merged, batch), before, atol=1e-4)
    plain = vla(checkpoint, rank=0).eval()
    plain.load_state_dict({k: v for k, v in policy.state_dict().items() if "lora_" not in k})
    assert not torch.allclose(answer(plain, batch), before, atol=1e-3)  # the adapters did something
    with pytest.raises(runs.BadRun, match="not empty"):
        export_policy(policy, tmp_path / "elsewhere")


def test_checkpoints_from_before_can_be_read(tmp_path):
    """Of a small part neither the description nor config.json names a pretrained model's settings,
    a robot's frame or narrow convolutions; a run folder of an earlier version is read as the same
    run."""
    config = PolicyConfig(size=SIZE, width=8, hidden=32)
    old = asdict(config)
    del old["pretrained"], old["robot"]["frame"], old["narrow"]
    assert used(asdict(config)) == old
    part = Reflector(ReflectorConfig(size=SIZE, width=32))
    assert "pretrained" not in used(part.description())["config"]
    path = tmp_path / "policy.safetensors"
    save_part(path, Policy(config), old)
    load_part(path, Policy(config), asdict(config))
    settings = json.loads(runs.config_to_json(runs.preset("debug")))
    for name in ("policy", "reflector"):
        del settings[name]["pretrained"], settings[name]["robot"]["frame"]
        del settings[name]["narrow"]
    for name in ("loop", "real_loop"):
        del settings[name]["adapter_rate"]
    assert runs.config_from_json(json.dumps(settings)) == runs.preset("debug")


def test_run_settings_come_back(checkpoints):
    """config.json holds the settings of a run with a pretrained model."""
    config = runs.with_pretrained(runs.preset("debug"), str(checkpoints["llava"]))
    assert runs.config_from_json(runs.config_to_json(config)) == config


# ----------------------------------------------------------------------------------- the reflector


def reader(folder, size: int = SIZE) -> Reflector:
    """A reflector on a tiny frozen checkpoint."""
    torch.manual_seed(0)
    return Reflector(ReflectorConfig(size=size, pretrained=large(folder)))


def scripted_frames(rows: int = 4) -> dict[str, torch.Tensor]:
    """Rows of three frames each; every second one is a success."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, 3, SIZE, SIZE, 3)
    return {
        "frames": torch.randint(0, 256, shape, generator=generator).to(torch.uint8),
        "tokens": tokenize([INSTRUCTIONS[task][0] for task in list(INSTRUCTIONS)[:rows]]),
        "state": torch.tensor([0.0, 0.6, 0.2, 1.0]).expand(rows, -1),
        "label": torch.arange(rows) % 2.0,
    }


def test_reflector_reads_three_frames_and_the_words(checkpoint):
    """R is a probability; each frame and the words change it; rows are judged alone."""
    reflector, batch = reader(checkpoint).eval(), scripted_frames()
    inputs = (batch["frames"], batch["tokens"], batch["state"])
    reward = reflector.reward(*inputs)
    assert reward.shape == (4,) and reward.min() >= 0 and reward.max() <= 1
    alone = reflector.reward(*(x[2:3] for x in inputs))
    assert torch.allclose(reward[2:3], alone, atol=1e-5)
    for frame in range(3):
        other = batch["frames"].clone()
        other[:, frame] = 255 - other[:, frame]
        assert (reflector.reward(other, *inputs[1:]) - reward).abs().max() > 1e-5, frame
    other = reflector.reward(batch["frames"], batch["tokens"].roll(1, 0), batch["state"])
    assert (other - reward).abs().max() > 1e-5


def test_reflector_trains_its_head_only_and_reads_each_frame_once(checkpoint):
    """Thirty steps over two batches of the same four rows: four rows go through the model."""
    reflector, batch = reader(checkpoint), scripted_frames()
    frozen = [p.clone() for p in reflector.vlm.parameters()]
    read = []
    reflector.vlm.vlm.register_forward_hook(lambda m, args, out: read.append(len(args[0])))
    flipped = {name: x.flip(0) for name, x in batch.items()}
    with torch.no_grad():
        first = reflector(batch)[0].item()
    fit(
        reflector,
        lambda step: flipped if step % 2 else batch,
        FitConfig(steps=30, learning_rate=3e-2, warmup=1),
    )
    assert sum(read) == 4
    with torch.no_grad():
        assert reflector(batch)[0].item() < 0.8 * first
    for weight, before in zip(reflector.vlm.parameters(), frozen, strict=True):
        assert weight.grad is None and not weight.requires_grad and torch.equal(weight, before)
    assert reflector.head.weight.grad is not None


def test_what_is_remembered_is_bounded(checkpoints):
    """The oldest rows are forgotten first, and a batch larger than the memory still works."""
    reflector, batch = reader(checkpoints["smolvlm"]).eval(), scripted_frames()
    reflector.vlm.remembered = 3
    frames = stack_frames(batch["frames"])
    whole = reflector.vlm(frames, batch["tokens"])
    assert len(reflector.vlm._memory) == 3
    read = []
    reflector.vlm.vlm.register_forward_hook(lambda m, args, out: read.append(len(args[0])))
    assert torch.equal(reflector.vlm(frames[1:], batch["tokens"][1:]), whole[1:])
    assert read == []
    again = reflector.vlm(frames[[0, 0]], batch["tokens"][[0, 0]])
    assert read == [1] and torch.allclose(again, whole[[0, 0]], atol=1e-5)


def test_reflector_is_saved_without_the_model(checkpoint, tmp_path):
    """Head, threshold and calibration; loaded, it judges the same."""
    reflector, batch = reader(checkpoint).eval(), scripted_frames()
    reflector.threshold.fill_(0.25)
    path = tmp_path / "reflector.safetensors"
    save_part(path, reflector, reflector.description())
    assert not any("language_model" in name for name in reflector.state_dict())
    assert path.stat().st_size < 10_000
    again = reader(checkpoint)
    again.head.reset_parameters()
    load_part(path, again, again.description())
    inputs = (batch["frames"], batch["tokens"], batch["state"])
    assert again.threshold == 0.25
    assert torch.equal(again.reward(*inputs), reflector.reward(*inputs))


# ------------------------------------------------------------------------------------------- errors


def complaint(config: PretrainedConfig) -> str:
    """The one line that `check` refuses with."""
    with pytest.raises(BadCheckpoint) as caught:
        check(config)
    text = str(caught.value)
    assert "\n" not in text and text.count("; ") >= 2 and "expected" in text
    return text


@pytest.fixture
def damaged(tmp_path):
    """A whole checkpoint to take something from."""
    save_tiny(tmp_path, "llava")
    return tmp_path


@pytest.mark.parametrize(
    "missing",
    ["config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"],
)
def test_a_missing_file_is_named(damaged, missing):
    (damaged / missing).unlink()
    assert missing in complaint(large(damaged))


def test_pickled_weights_are_not_read(damaged):
    """A checkpoint with pytorch_model.bin only."""
    (damaged / "model.safetensors").rename(damaged / "pytorch_model.bin")
    assert "pickled" in complaint(large(damaged))


def test_a_missing_shard_is_named(damaged):
    """An index that lists two files of which one is there."""
    (damaged / "model.safetensors").rename(damaged / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-2.safetensors" in complaint(large(damaged))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_was_cut_short_is_named(damaged, name):
    whole = (damaged / name).read_bytes()
    (damaged / name).write_bytes(whole[: len(whole) // 2])
    assert name in complaint(large(damaged))


@pytest.mark.parametrize("kind", ["llama", "openvla", None, ["llava"], {"llava": 1}, 7])
def test_an_architecture_that_reads_no_pictures_is_refused(damaged, kind):
    """A text-only model, one that brings its own code, none at all, no name."""
    settings = {"model_type": kind, "auto_map": {"AutoConfig": "evil.Config"}}
    (damaged / "config.json").write_text(json.dumps(settings))
    (damaged / "evil.py").write_text("raise SystemExit('this code must never run')")
    assert f"unknown architecture {kind!r}" in complaint(large(damaged))


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_settings_of_another_kind_are_told_in_a_line(damaged, name):
    """A tokenizer that was cut short; a text where a number belongs. Both libraries raise a plain
    Exception."""
    text = (damaged / name).read_text()
    if name == "tokenizer.json":
        text = text[: len(text) // 2]
    else:
        settings = json.loads(text)
        settings["text_config"]["hidden_size"] = "sixteen"
        text = json.dumps(settings)
    (damaged / name).write_text(text)
    with pytest.raises(BadCheckpoint, match=r"cannot be used.*expected an image-text"):
        PretrainedVLM(large(damaged))


STATISTICS = [
    {"image_mean": None}, {"image_mean": 0.5}, {"image_mean": "abc"}, {"image_mean": [0.5, 0.5]},
    {"image_mean": ["a", "b", "c"]}, {"image_mean": [math.nan] * 3}, {"image_std": [10**400] * 3},
    {"image_std": [1, 0, 1]}, {"image_std": {}}, {"image_processor": [1]}, {"image_processor": 0},
]  # fmt: skip


@pytest.mark.parametrize("statistics", STATISTICS, ids=lambda settings: str(settings)[:40])
def test_statistics_of_another_kind_are_told_in_a_line(damaged, statistics):
    """They must be three numbers each, and nothing is divided by 0."""
    (damaged / "preprocessor_config.json").write_text(json.dumps(statistics))
    text = complaint(large(damaged))
    assert "image_mean is" in text and "expected three numbers each" in text
    with pytest.raises(BadCheckpoint, match="image_mean is"):
        PretrainedVLM(large(damaged))


def literal_tokens() -> list[tuple[str, str]]:
    """(family, each special token that its prompt must have)."""
    found = [("llava", "<image>"), ("qwen2_vl", "<|image_pad|>"), ("gemma3", "<image>")]
    for name, family in pretrained.FAMILIES.items():
        literal = sorted(set(re.findall("<[^<>]+>", family.picture + family.prompt)))
        found += [(name, token) for token in literal if token != "<global-img>"]
    return found


@pytest.mark.parametrize("family, token", literal_tokens())
def test_a_tokenizer_without_a_special_token_is_refused(checkpoints, tmp_path, family, token):
    """Another model's, say: the token would be read as text. Judged without weights."""
    for path in checkpoints[family].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tiny_tokenizer(without=token).save_pretrained(tmp_path)
    missing = "ordinary" if token in ("<image>", "<|image_pad|>") else token
    assert f"{missing} is no special token of its tokenizer" in complaint(large(tmp_path))


def test_a_tag_may_be_spelled_out(checkpoints, tmp_path):
    """That of SmolVLM and Idefics 3, as Idefics 3's own tokenizer does."""
    for path in checkpoints["idefics3"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tiny_tokenizer(without="<global-img>").save_pretrained(tmp_path)
    check(large(tmp_path))


@pytest.mark.parametrize("number", [9999, -1])
def test_an_image_token_that_the_tokenizer_does_not_have_is_refused(damaged, number):
    """Told before the first prompt is written, with the weights and without."""
    settings = json.loads((damaged / "config.json").read_text())
    (name,) = [name for name in settings if name.startswith("image_token_i")]
    (damaged / "config.json").write_text(json.dumps(settings | {name: number}))
    assert "cannot be used" in complaint(large(damaged))
    with pytest.raises(BadCheckpoint, match="cannot be used"):
        PretrainedVLM(large(damaged))


def test_a_tokenizer_that_cannot_pad_is_refused(damaged):
    """Neither by a token of its own nor by that of the end."""
    path = damaged / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"], settings["eos_token"]
    path.write_text(json.dumps(settings))
    (damaged / "special_tokens_map.json").unlink(missing_ok=True)
    assert "neither pad_token nor eos_token" in complaint(large(damaged))


def test_weights_of_another_architecture_are_refused(checkpoints, damaged):
    """Those of LLaVA, said to be PaliGemma's."""
    (damaged / "config.json").write_bytes((checkpoints["paligemma"] / "config.json").read_bytes())
    with pytest.raises(BadCheckpoint, match=r"cannot be used.*expected an image-text"):
        PretrainedVLM(large(damaged))


def spoil(folder, change) -> None:
    """Write the weights of a checkpoint anew after `change(weights, name of a query's)`."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights, next(n for n in weights if "q_proj" in n and "language_model" in n))
    save_file(weights, path, metadata={"format": "pt"})


def shorten(weights, name: str) -> None:
    weights[name] = weights[name][1:].clone()


@pytest.mark.parametrize(
    "change, told",
    [
        (dict.pop, "no weights for .*q_proj"),
        (shorten, r".*q_proj.* is \(31, 32\) and not \(32, 32\)"),
    ],
)
def test_a_missing_or_foreign_weight_is_named(damaged, change, told):
    """Otherwise transformers would fill the gap with random numbers. From the headers alone, and
    when the weights are loaded."""
    spoil(damaged, change)
    assert re.search(rf"cannot be used \({told}", complaint(large(damaged)))
    with pytest.raises(BadCheckpoint, match=rf"cannot be used \({told}"):
        PretrainedVLM(large(damaged))


def test_shards_are_compared_as_one(damaged):
    """A checkpoint in two files and an index; whole, and with an index that names a weight which
    neither file has."""
    from safetensors.torch import load_file, save_file

    path = damaged / "model.safetensors"
    weights, files = load_file(path), ("model-1.safetensors", "model-2.safetensors")
    path.unlink()
    where = {name: files[row % 2] for row, name in enumerate(weights)}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in files:
        some = {name: weights[name] for name in weights if where[name] == file}
        save_file(some, damaged / file, metadata={"format": "pt"})
    check(large(damaged))
    some.popitem()
    save_file(some, damaged / file, metadata={"format": "pt"})
    assert "no weights for" in complaint(large(damaged))


def test_no_number_is_read_to_judge_a_checkpoint(checkpoint, monkeypatch):
    """Only headers: no file of weights is loaded, and nothing of the model is in memory."""
    import safetensors.torch

    monkeypatch.setattr(safetensors.torch, "load_file", None)  # would fail if used
    check(large(checkpoint))
    vlm = PretrainedVLM(large(checkpoint), weights=False)
    assert all(p.is_meta for p in vlm.parameters())


def test_plain_pictures_need_no_row(tmp_path):
    """ViP-LLaVA is not in FAMILIES: judged without weights, and read with them."""
    save_tiny(tmp_path, "vipllava")
    check(large(tmp_path))
    vlm = PretrainedVLM(large(tmp_path)).eval()
    assert vlm.image_tokens == 16
    hidden = vlm(torch.zeros(2, 1, 3, SIZE, SIZE), ["open the drawer", "close it"])
    assert hidden.shape[0] == 2 and hidden.isfinite().all()


def test_an_architecture_that_needs_a_row_is_refused(tmp_path):
    """LLaVA-NeXT wants its picture in tiles, and their size."""
    save_tiny(tmp_path, "llava_next")
    text = complaint(large(tmp_path))
    assert "'llava_next'" in text and "needs a row in pretrained.FAMILIES" in text


def test_an_architecture_that_tells_image_tokens_apart_is_refused(checkpoints, monkeypatch):
    """Gemma 3 takes plain pictures; without its row nothing would say which tokens are theirs."""
    monkeypatch.delitem(pretrained.FAMILIES, "gemma3")
    text = complaint(large(checkpoints["gemma3"]))
    assert "which tokens are a picture's" in text and "needs a row in pretrained.FAMILIES" in text


def test_no_access_to_the_hub(monkeypatch):
    """An id that is not in the cache, without network; and a path that is no id."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text = complaint(large("nobody/a-model-that-is-not-there"))
    assert "no access to it on the hub" in text and "network" in text
    assert "no such folder" in complaint(large("/no/such/folder"))


def test_a_network_that_fails_is_no_access(monkeypatch):
    """What the hub's HTTP library raises is neither an OSError nor a ValueError."""
    import huggingface_hub

    class ProxyError(Exception):
        pass

    def refused(*_, **__):
        raise ProxyError("407 Proxy Authentication Required")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    text = complaint(large("nobody/a-model-that-is-not-there"))
    assert "no access to it on the hub (ProxyError)" in text and "network" in text


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(checkpoints, monkeypatch, capsys):
    """The line says what it needs and what there is; with room it says so too, and goes on."""
    import psutil
    import transformers

    folder = checkpoints["qwen2_vl"]
    Memory = namedtuple("Memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(1000))
    monkeypatch.setattr(transformers, "AutoModelForImageTextToText", None)  # would fail if used
    text = complaint(large(folder))
    assert re.search(r"needs about \S+ GiB of memory \(estimate\).*available", text)
    monkeypatch.undo()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(2**30))
    check(large(folder))
    assert re.search(r"needs about \S+ GiB .*, 1 are available", capsys.readouterr().err)


def test_on_a_gpu_its_own_memory_counts(checkpoints, monkeypatch, capsys):
    """What the machine has must do for the weights alone, which are loaded there first."""
    import psutil

    Memory = namedtuple("Memory", "available")
    model = large(checkpoints["llava"])
    needed = check(model)
    weights = needed / pretrained.OVERHEAD
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(weights + 1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (needed, 2 * needed))
    capsys.readouterr()
    assert check(model, "cuda") == needed
    assert "of the GPU's memory (estimate)" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (needed - 1, 2 * needed))
    with pytest.raises(BadCheckpoint, match="GiB of the GPU's memory"):
        check(model, "cuda")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(weights - 1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * needed, 2 * needed))
    with pytest.raises(BadCheckpoint, match="GiB of memory"):
        check(model, "cuda")


@pytest.mark.parametrize("told", ["index", "hub"])
def test_a_model_that_does_not_fit_is_not_downloaded(checkpoints, tmp_path, monkeypatch, told):
    """Its *.json come first; how large it is stands in its index, or the hub says so. With room for
    it, the weights follow."""
    import huggingface_hub
    import psutil

    Memory = namedtuple("Memory", "available")
    hub = checkpoints["llava"]
    size = (hub / "model.safetensors").stat().st_size
    asked = []

    def download(repository, revision, allow_patterns, ignore_patterns):
        asked.append(allow_patterns)
        for path in hub.iterdir():
            if path.suffix == ".json" or "*.safetensors" in allow_patterns:
                (tmp_path / path.name).write_bytes(path.read_bytes())
        return str(tmp_path)

    def metadata(url):
        assert url.endswith("owner/name/resolve/main/model.safetensors")
        return namedtuple("Metadata", "size")(size)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(
        huggingface_hub, "get_hf_file_metadata", metadata if told == "hub" else None
    )
    index = tmp_path / "model.safetensors.index.json"
    if told == "index":
        content = {"metadata": {"total_size": size}, "weight_map": {"a": "model.safetensors"}}
        index.write_text(json.dumps(content))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(size - 1))
    assert "owner/name: needs about" in complaint(large("owner/name"))
    assert asked == [["*.json"]]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(2 * size))
    check(large("owner/name"))
    assert asked[1] == ["*.json"] and "*.safetensors" in asked[2]


def test_memory_is_counted_from_the_headers(checkpoints):
    """All weights once, times their width, plus the allowance."""
    folder = checkpoints["smolvlm"]
    weights = sum(p.numel() for p in PretrainedVLM(large(folder)).model.parameters())
    files = pretrained.weight_files(folder)
    assert pretrained.memory_needed(files, bf16=False) == round(4 * weights * pretrained.OVERHEAD)
    assert pretrained.memory_needed(files, bf16=True) == round(2 * weights * pretrained.OVERHEAD)


def test_missing_peft_is_named(checkpoints, monkeypatch):
    """Only where adapters are wanted: a frozen reflector does not need it."""
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "requirements-gpu.txt" in complaint(large(checkpoints["llava"], rank=4))
    check(large(checkpoints["llava"]))


def test_settings_that_contradict_each_other():
    """A backbone without a checkpoint, a checkpoint without the backbone, a trained reflector."""
    with pytest.raises(ValueError, match="expected both or neither"):
        PolicyConfig(backbone="pretrained")
    with pytest.raises(ValueError, match="expected both or neither"):
        PolicyConfig(pretrained=large("somewhere"))
    with pytest.raises(ValueError, match="expected 0"):
        ReflectorConfig(pretrained=large("somewhere", rank=4))
    with pytest.raises(ValueError, match="lora_rank: got -1"):
        PretrainedConfig(lora_rank=-1)


def test_the_command_line_refuses_in_one_line(tmp_path, capsys):
    """Exit code 2, and no run folder."""
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as caught:
        cli.app(["train", "--pretrained", "/no/such/model", "--out", str(out), "--preset", "debug"])
    assert caught.value.code == 2 and not out.exists()
    (line,) = capsys.readouterr().err.splitlines()
    missing = "peft" if "peft" in line else "/no/such/model"
    assert line.startswith("error: ") and missing in line


def refused(monkeypatch, capsys, words: list[str], tree) -> str:
    """The one line that the command leaves with, exit code 2; `tree` stays empty."""
    monkeypatch.setattr(pretrained, "_import_peft", lambda: None)  # it would be told first
    with pytest.raises(SystemExit) as caught:
        cli.app(["train", "--preset", "debug", *words, "--out", str(tree / "deep" / "run")])
    assert caught.value.code == 2 and list(tree.iterdir()) == []
    lines = [line for line in capsys.readouterr().err.splitlines() if "are available" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_bad_weights_are_told_before_anything_is_played(
    damaged, tmp_path_factory, capsys, monkeypatch
):
    """A weight that is missing, and an architecture without a row."""
    tree = tmp_path_factory.mktemp("tree")
    spoil(damaged, dict.pop)
    line = refused(monkeypatch, capsys, ["--pretrained", str(damaged)], tree)
    assert "no weights for" in line
    save_tiny(damaged, "llava_next")
    capsys.readouterr()  # the bar of what was saved
    line = refused(monkeypatch, capsys, ["--pretrained", str(damaged)], tree)
    assert "needs a row in pretrained.FAMILIES" in line


# -------------------------------------------------------------------------------- the whole command


def begin(words: list[str], out, log) -> subprocess.Popen:
    """The real command, in a process group of its own."""
    command = [sys.executable, str(Path(cli.__file__)), "train", *words, "--out", str(out)]
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def kill_in(stage: str, words: list[str], out, log) -> None:
    """Begin the command and end it by SIGKILL once `stage` has left a state to resume from."""
    process, until = begin(words, out, log), time.time() + 1800
    while not any((out / "resume").glob(f"{stage}*")):
        assert process.poll() is None and time.time() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert stage not in runs.Run.open(out).stages


@pytest.mark.slow
def test_the_whole_command_killed_and_resumed(checkpoints, tmp_path):
    """`train --pretrained` to its end, killed while it imitates and while it plays LOOP: the
    imitated policy is that of a run in peace, bit by bit, and every stage finishes."""
    pytest.importorskip("peft", reason="peft is in requirements-gpu.txt")
    from checkpoints import same_parts

    words = ["--preset", "debug", "--tasks", "handle-press", "--starts", "1"]
    words += ["--pretrained", str(checkpoints["smolvlm"])]
    with (tmp_path / "log").open("w+") as log:
        assert begin([*words, "--until", "sft"], tmp_path / "peace", log).wait() == 0
        for stage in ("sft", "rl"):
            kill_in(stage, words, tmp_path / "run", log)
        code = begin(words, tmp_path / "run", log).wait()
        log.seek(0)
        assert code == 0, log.read()
    run, peace = runs.Run.open(tmp_path / "run"), runs.Run.open(tmp_path / "peace")
    assert list(run.stages) == list(order.STAGES)
    assert same_parts(run.checkpoint("sft"), peace.checkpoint("sft"))
    assert not same_parts(run.checkpoint("sft"), run.checkpoint("filtered_bc"))
    for name in ("sft", "filtered_bc", "dream_bc", "policy"):
        policy = run.policy(name)
        assert any("lora_" in weight for weight in policy.state_dict())
    assert run.reflector().frozen and math.isfinite(run.stages["rl"]["history"][-1]["return"])
    assert run.checkpoint("reflector").stat().st_size < 50_000  # its head alone
    assert (tmp_path / "run" / "report.html").is_file()


# ------------------------------------------------------------------------------------------ presets


def test_a_presets_estimate_is_that_of_the_docs():
    """What `train` prints stands in the table as well."""
    page = (Path(cli.__file__).parent / "docs" / "pretrained.md").read_text()
    for preset, text in estimates.ESTIMATES.items():
        (row,) = [row for row in page.splitlines() if row.startswith(f"| `{preset}` |")]
        assert all(words in row for words in text.split(", ")), preset
        config = runs.preset(preset)
        (line,) = estimates.expected(preset, "cuda", config)
        assert text in line and "estimate" in line
        assert "expect days" in estimates.expected(preset, "cpu", config)[1]
    assert estimates.expected("cpu", "cpu", runs.preset("cpu")) == []


def test_paper_preset_has_the_papers_numbers():
    """Those of its section "RL post-training"."""
    config = runs.preset("paper")
    assert config.policy.pretrained.lora_rank == 32 and config.policy.backbone == "pretrained"
    assert config.reflector.pretrained.checkpoint and config.reflector.threshold == 0.5
    for loop in (config.loop, config.real_loop):
        assert (loop.adapter_rate, loop.learning_rate) == (1e-4, 1e-5)
        assert (loop.rollouts, loop.clip, loop.minibatch, loop.iterations) == (8, 0.1, 4, 20)
        assert (loop.branch, loop.noise, loop.time_penalty, loop.held) == (0, 1.0, 0.0, False)


def test_a_pretrained_model_in_any_preset(checkpoints, monkeypatch):
    """Policy and reflector take it, by a path that holds anywhere; nothing else changes but the
    rates."""
    before, folder = runs.preset("debug"), str(checkpoints["smolvlm"])
    monkeypatch.chdir(checkpoints["smolvlm"].parent)
    after = runs.with_pretrained(before, "smolvlm")
    assert after.policy.pretrained == PretrainedConfig(folder, lora_rank=32)
    assert after.reflector.pretrained == PretrainedConfig(folder)
    assert after.simulator == before.simulator and after.loop.groups == before.loop.groups
    assert runs.with_pretrained(before, "") == before
