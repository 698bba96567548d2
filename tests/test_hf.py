"""`xpos_zoo.hf`: transformers loads, generates, trains and saves our models, and the numbers are ours."""

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from builders import far_apart, tokens
from reference import relative_error, roundoff
from test_pretrained import MODELS, dtypes, make, rewritten

from train.tokens import byte_tokenizer
from xpos_zoo import ScaleInvariant, SoftTail, Transformer

transformers = pytest.importorskip("transformers", minversion="5.24")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402

from xpos_zoo.hf import XposConfig, XposForCausalLM  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning", "default::UserWarning")
CONTRACT = 1e-5  # of a cache, in float32
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}


def written(folder: Path, block_size: int | None = None) -> Transformer:
    """A byte model with large weights, so that logits are far apart, in a folder with its tokenizer."""
    model = far_apart(builders.model(vocab_size=256, block_size=block_size))
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return model


@pytest.fixture(params=[None, 8], ids=["dense", "blockwise"])
def both(request, tmp_path) -> tuple[Transformer, Any]:
    """Ours, and the same loaded by transformers."""
    return written(tmp_path / "model", request.param), AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_a_folder_goes_both_ways_bit_for_bit(options, tmp_path):
    ours, words = make(**options), tokens(2, 30, below=11)
    ours.distance_bias = ScaleInvariant(5.0)
    ours.save_pretrained(tmp_path / "first")
    theirs, found = AutoModelForCausalLM.from_pretrained(tmp_path / "first", output_loading_info=True)  # type: ignore[misc]
    assert not any(found.values())
    assert theirs.dtype == options.get("dtype", torch.float32)
    assert torch.equal(theirs(words).logits, ours(words))
    theirs.model.distance_bias = SoftTail(2.0, 16)  # of the model, which the folder must then hold
    theirs.save_pretrained(tmp_path / "second")
    again = Transformer.from_pretrained(tmp_path / "second")
    assert again.config == theirs.model.config
    assert torch.equal(again(words), theirs(words).logits)
    assert dtypes(again) == dtypes(ours)


def test_a_fresh_model_begins_as_ours_does():
    values: dict[str, Any] = {"vocab_size": 50, "embed_dim": 32, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(XposConfig(**values))
    torch.manual_seed(0)
    ours = Transformer(**values)
    assert torch.equal(theirs(tokens(2, 9)).logits, ours(tokens(2, 9)))


def test_a_model_with_more_tokens_is_saved_as_one(both, tmp_path):
    _, theirs = both
    theirs.resize_token_embeddings(300)
    theirs.save_pretrained(tmp_path / "more")
    words = tokens(2, 9, below=300)
    assert torch.equal(Transformer.from_pretrained(tmp_path / "more")(words), theirs(words).logits)


def test_greedy_sampled_and_beam_tokens_are_those_of_full_forwards(both):
    ours, theirs = both
    words = tokens(2, 11, below=256)
    assert torch.equal(theirs.generate(words, max_new_tokens=300, **GREEDY), ours.generate(words, 300, temperature=0))
    for options in ({"do_sample": True, "top_p": 0.9}, {"num_beams": 3, "do_sample": False}):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            results.append(theirs.generate(words, max_new_tokens=30, pad_token_id=0, use_cache=use_cache, **options))
        assert torch.equal(*results)


def test_prompt_lookup_gives_the_greedy_tokens_where_a_cache_can_be_cropped(both):
    ours, theirs = both
    words = tokens(1, 11, below=256)
    look = partial(theirs.generate, words, max_new_tokens=60, prompt_lookup_num_tokens=3, **GREEDY)
    if ours.block_size is None:
        assert torch.equal(look(), ours.generate(words, 60, temperature=0))
    else:
        with pytest.raises(ValueError, match="requires a cache that can be cropped"):
            look()
        cache = theirs(words, use_cache=True).cache
        with pytest.raises(ValueError, match="block_size must be None to crop a cache"):
            cache.crop(-1)


def test_prompts_padded_on_the_left_go_on_as_each_alone(both):
    _, theirs = both
    prompts = [tokens(n, below=256) for n in (3, 17, 11)]
    width = max(map(len, prompts))
    words = torch.stack([torch.cat((torch.zeros(width - len(p), dtype=torch.int64), p)) for p in prompts])
    mask = torch.stack([(torch.arange(width) >= width - len(p)).long() for p in prompts])
    for options in ({}, {"num_beams": 2}):
        together = theirs.generate(words, attention_mask=mask, max_new_tokens=40, **GREEDY, **options)
        for row, prompt in zip(together, prompts, strict=True):
            alone = theirs.generate(prompt[None], max_new_tokens=40, **GREEDY, **options)
            assert torch.equal(row[width:], alone[0, len(prompt) :])


def test_logits_states_and_loss_are_those_of_transformers_conventions(both):
    ours, theirs = both
    words = tokens(2, 20, below=256)
    output = theirs(words, labels=words, output_hidden_states=True, logits_to_keep=0)
    expected = torch.nn.functional.cross_entropy(ours(words)[:, :-1].flatten(0, 1), words[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[0], ours.embedding(words))
    assert torch.equal(ours.head(output.hidden_states[-1]), output.logits)
    for keep in (3, torch.tensor([0, 7])):
        expected = output.logits[:, -3:] if isinstance(keep, int) else output.logits[:, keep]
        assert relative_error(theirs(words, logits_to_keep=keep).logits, expected) <= 8 * roundoff(torch.float32)
    assert torch.equal(theirs(inputs_embeds=ours.embedding(words), return_dict=False)[0], output.logits)


def test_a_pipeline_reads_and_writes_bytes(both, tmp_path):
    ours, _ = both
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "héllo 世界\n\t!"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    write = pipeline("text-generation", model=str(tmp_path / "model"))
    (answer,) = write("the ", max_new_tokens=20, return_full_text=False, **GREEDY)
    expected = ours.generate(torch.tensor([list(b"the ")]), 20, temperature=0)[0, 4:]
    assert answer["generated_text"] == tokenizer.decode(expected)


def test_checkpointed_gradients_are_the_same_and_keep_less(both):
    _, theirs = both
    theirs.requires_grad_(True).train()
    words, gradients, kept = tokens(2, 40, below=256), [], []
    for enable in (False, True):
        if enable:
            theirs.activation_checkpointing_enable()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            loss = theirs(words, labels=words).loss
        kept.append(sum(sizes))
        gradients.append(torch.autograd.grad(loss, list(theirs.parameters())))
    assert kept[1] < kept[0] / 2
    assert theirs.is_activation_checkpointing
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_ten_steps_of_trainer_lower_the_loss(both, tmp_path):
    pytest.importorskip("accelerate")
    _, theirs = both
    theirs = AutoModelForCausalLM.from_config(theirs.config)
    words = torch.tensor([3, 1, 4, 1, 5]).repeat(6)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=10, learning_rate=0.01, logging_steps=1, report_to=[], use_cpu=True,
        lr_scheduler_type="constant",
    )  # fmt: skip
    data = [{"input_ids": words, "labels": words}] * 80
    trainer = transformers.Trainer(theirs, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(256), abs=0.1)
    assert losses[-1] < losses[0] / 2
    trainer.save_model(str(tmp_path / "saved"))
    again = Transformer.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(words[None]), theirs.eval()(words[None]).logits)


@pytest.mark.slow
def test_lora_trains_its_adapters_alone_and_merges(both):
    peft = pytest.importorskip("peft")
    _, theirs = both
    words = tokens(2, 20, below=256)
    before = theirs(words).logits
    targets = ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False)
    tuned = peft.get_peft_model(theirs, config)
    output = tuned(words, labels=words)
    output.loss.backward()
    learned = {name for name, parameter in tuned.named_parameters() if parameter.grad is not None}
    assert len(learned) == 2 * 2 * len(targets)  # in two layers
    assert all("lora_" in name for name in learned)
    assert relative_error(output.logits, before) > 1e-3
    assert relative_error(tuned.merge_and_unload()(words).logits, output.logits) <= CONTRACT


load, positions = AutoModelForCausalLM.from_pretrained, {"name": "os.system"}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda f, m: XposForCausalLM.from_pretrained(rewritten(f, model_type="gpt2")), "'xpos_zoo', got 'gpt2'"),
        (lambda f, m: AutoConfig.from_pretrained(rewritten(f, version=2)), "config must have version 3, got 2"),
        (lambda f, m: load(rewritten(f, positions=positions)), "XPOS or RotaryEmbedding, got {'name': 'os.system'}"),
        (lambda f, m: m(torch.tensor([[3, 300]])), "input_ids must be from 0 to 255, got 3 to 300: of another toke"),
        (lambda f, m: m(tokens(2, 5), attention_mask=tokens(2, 4)), "attention_mask must be (2, 5), got (2, 4)"),
        (lambda f, m: m(tokens(2, 5), cache=transformers.DynamicCache()), "cache must be that of an earlier output, "),
        (lambda f, m: m(), "input_ids or inputs_embeds must be given, not both"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(call, said, tmp_path):
    written(tmp_path)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (its message is compared below)
        call(tmp_path, load(tmp_path))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_pages_examples_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "huggingface.md").read_text()
    first, *rest = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(first, names)
    byte_tokenizer().save("my_model/tokenizer.json")
    for example in rest:
        exec(example, names)
    assert names["tokens"].shape == (1, 24)
    assert names["rows"].shape == (2, 36)
    assert names["batch"].attention_mask[0].tolist() == 12 * [0] + 4 * [1]
    assert names["text"][0]["generated_text"].startswith("def ")
    assert Transformer.from_pretrained("my_blockwise_model").block_size == 32


def test_a_loop_by_hand_may_call_the_cache_past_key_values(both):
    _, theirs = both
    words = tokens(2, 20)
    expected, before = theirs(words).logits, theirs(words[:, :15], use_cache=True).past_key_values
    for i in range(15, 20):
        output = theirs(words[:, i : i + 1], past_key_values=before)
        assert relative_error(output.logits, expected[:, i : i + 1]) < CONTRACT
        before = output.past_key_values
    with pytest.raises(ValueError, match="two names of one argument"):
        theirs(words[:, :1], cache=before, past_key_values=before)


def test_a_model_that_transformers_wrote_in_pieces_is_read(both, tmp_path):
    ours, theirs = both
    theirs.save_pretrained(tmp_path / "pieces", max_shard_size="20KB")
    assert not (tmp_path / "pieces" / "model.safetensors").exists()
    words = tokens(2, 9)
    assert torch.equal(Transformer.from_pretrained(tmp_path / "pieces")(words), ours(words))
    missing = sorted((tmp_path / "pieces").glob("model-*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(ValueError, match=rf"^there is no {missing}"):
        Transformer.from_pretrained(tmp_path / "pieces")
