"""`xpos_zoo.hf`: transformers loads, generates, trains and saves our models, and the numbers are ours."""

import copy
import math
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from builders import far_apart, tokens
from reference import relative_error, roundoff
from test_pretrained import MODELS, TOKENS, dtypes, make, rewritten

from train.tokens import byte_tokenizer
from xpos_zoo import ScaleInvariant, SoftTail, Transformer

transformers = pytest.importorskip("transformers", minversion="5.24")
safetensors_torch = pytest.importorskip("safetensors.torch")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402

from xpos_zoo.hf import XposCache, XposConfig, XposForCausalLM  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning", "default::UserWarning")
CONTRACT = 1e-5  # of a cache, in float32
load: Any = AutoModelForCausalLM.from_pretrained
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


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors_torch.load_file(folder / "model.safetensors")


def load_in_another_module(model: Any, folder: Path) -> None:
    named = {f"inner.{name}": weight for name, weight in weights(folder).items()}
    torch.nn.ModuleDict({"inner": model}).load_state_dict(named, strict=False)


def load_by_accelerate(model: Any, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    source = accelerate.Accelerator(cpu=True)
    source.prepare(load(folder))
    source.save_state(str(folder / "state"))
    target = accelerate.Accelerator(cpu=True)
    target.prepare(model)
    target.load_state(str(folder / "state"))


def load_shards(model: Any, folder: Path) -> None:
    load(folder).save_pretrained(folder / "pieces", max_shard_size="20KB")
    transformers.trainer_utils.load_sharded_checkpoint(model, folder / "pieces", strict=False)


def load_and_dispatch(model: Any, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    load(folder).save_pretrained(folder / "own", save_original_format=False)
    with accelerate.init_empty_weights():
        empty = XposForCausalLM(model.config).eval()
    empty.tie_weights()
    empty = accelerate.load_checkpoint_and_dispatch(empty, folder / "own", device_map={"": "cpu"})
    model.load_state_dict(empty.state_dict())


LOADERS: dict[str, Callable[[Any, Path], Any]] = {
    "strict": lambda m, f: m.load_state_dict(weights(f)),
    "not strict": lambda m, f: m.load_state_dict(weights(f), strict=False),
    "assigned": lambda m, f: m.load_state_dict(weights(f), assign=True),
    "its own names": lambda m, f: m.load_state_dict(load(f).state_dict()),
    "safetensors": lambda m, f: safetensors_torch.load_model(m, f / "model.safetensors"),
    "accelerate's file": lambda m, f: pytest.importorskip("accelerate").load_checkpoint_in_model(m, f),
    "accelerate's state": load_by_accelerate,
    "dispatched": load_and_dispatch,
    "shards": load_shards,
    "in another module": load_in_another_module,
}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS.keys())
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_weights_load_by_the_names_in_files_and_by_those_of_the_model(loader, tied, tmp_path):
    ours = make(tie_embeddings=tied)
    ours.save_pretrained(tmp_path)
    model: Any = XposForCausalLM(XposConfig(**vars(ours.config))).eval()
    assert not torch.equal(model(TOKENS).logits, ours(TOKENS))
    loader(copy.deepcopy(pickle.loads(pickle.dumps(model))), tmp_path)
    loader(model, tmp_path)
    assert torch.equal(model(TOKENS).logits, ours(TOKENS))
    with pytest.raises(RuntimeError, match=r'Missing key.*"model.norm.weight"'):
        model.load_state_dict({name: weight for name, weight in weights(tmp_path).items() if name != "norm.weight"})
    model.save_pretrained(tmp_path / "again", save_original_format=False)
    assert torch.equal(Transformer.from_pretrained(tmp_path / "again")(TOKENS), ours(TOKENS))


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
        with pytest.raises(ValueError, match="block_size and window_size must be None to crop a cache"):
            cache.crop(-1)


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different length as one batch with zeros on one side, or in the middle of each, and their mask."""
    width = max(map(len, rows))
    starts = {"left": [width - len(row) for row in rows], "right": [0 for _ in rows], "middle": [0 for _ in rows]}
    words, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for i, (row, start) in enumerate(zip(rows, starts[side], strict=True)):
        places = torch.arange(start, start + len(row))
        if side == "middle":
            places[len(row) // 2 :] += width - len(row)
        words[i, places], mask[i, places] = row, 1
    return words, mask


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_prompts_padded_anywhere_go_on_as_each_alone(both, side):
    ours, theirs = both
    prompts = [tokens(n, below=256) for n in (3, 17, 11)]
    words, mask = padded(prompts, side)
    generate, width = partial(theirs.generate, max_new_tokens=20, **GREEDY), words.shape[1]
    for options in ({}, {"num_beams": 2}, {"use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}):
        together = generate(words, attention_mask=mask, **options)
        alone = torch.cat([generate(prompt[None], **options)[:, len(prompt) :] for prompt in prompts])
        assert torch.equal(together[:, width:], alone)
        assert torch.equal(together[:: len(alone) // 3, :width], words)
    embedded = generate(inputs_embeds=ours.embedding(words), attention_mask=mask)
    assert torch.equal(embedded, generate(words, attention_mask=mask)[:, width:])
    draw = partial(generate, do_sample=True, top_k=9)
    results = []
    for batch in ((words, mask), padded(prompts, "left")):
        torch.manual_seed(0)
        results.append(draw(batch[0], attention_mask=batch[1])[:, width:])
    assert torch.equal(*results)
    if ours.block_size is None:
        row, options = slice(2, 3), {"prompt_lookup_num_tokens": 3}
        assert torch.equal(
            generate(words[row], attention_mask=mask[row], **options)[:, width:],
            generate(prompts[2][None], **options)[:, len(prompts[2]) :],
        )


def test_prompts_are_prefilled_in_chunks_unless_a_row_has_none_of_its_tokens_in_the_last(both):
    _, theirs = both
    prompts = [tokens(n, below=256) for n in (3, 17, 11)]
    generate = partial(theirs.generate, max_new_tokens=9, **GREEDY)
    words, mask = padded(prompts, "left")
    expected = generate(words, attention_mask=mask)
    assert torch.equal(generate(words, attention_mask=mask, prefill_chunk_size=5), expected)
    words, mask = padded(prompts, "right")
    with pytest.raises(ValueError, match="attention_mask must have a 1 in each row of a prompt, and of its last"):
        generate(words, attention_mask=mask, prefill_chunk_size=5)


@pytest.mark.parametrize("ragged", [False, True])
def test_a_chat_of_three_turns_feeds_what_is_new_and_gives_the_tokens_of_one_without_a_cache(both, ragged):
    _, theirs = both
    fed: list[int] = []
    theirs.model.embedding.register_forward_hook(lambda _, inputs, __: fed.append(inputs[0].shape[1]))
    said, mask = (tokens(2, 0, below=256) for _ in range(2))
    cache = XposCache(theirs)
    for turn, side in enumerate(("right", "left", "middle")):
        lengths = (5 + turn, 9) if ragged else (9, 9)
        new, new_mask = padded([tokens(n, below=250) + turn for n in lengths], side)
        said, mask = torch.cat((said, new), dim=1), torch.cat((mask, new_mask), dim=1)
        options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 7, **GREEDY}
        expected = theirs.generate(said, **options)
        fed.clear()
        answer = theirs.generate(said, cache=cache, **options)
        assert torch.equal(answer, expected)
        assert fed == [9 + (turn > 0), *6 * [1]]  # the last token of an answer is not fed in its own turn
        said, mask = answer, torch.nn.functional.pad(mask, (0, 7), value=1)
    with pytest.raises(
        ValueError, match=r"input_ids must be all tokens, the 47 columns in the cache and new ones, got 9"
    ):
        theirs.generate(said[:, :9], cache=cache, max_new_tokens=1, **GREEDY)
    mask[1, 20] = 0
    with pytest.raises(ValueError, match="attention_mask must have a 1 for each token in the cache, "):
        theirs.generate(said, attention_mask=mask, cache=cache, max_new_tokens=1, **GREEDY)


ASKED: dict[str, Any] = {  # of a cache that holds 6 columns of 2 rows, and what it says
    "__len__": 2, "batch_size": 2, "is_compileable": False, "is_initialized": True,
    "is_linear": [False, False], "is_dummy": [False, False], "layer_class_to_replicate": None, "offloading": False,
    "get_seq_length()": 6, "get_seq_length(1)": 6, "get_query_offset()": 6, "get_max_length()": -1,
    "get_mask_sizes(4, 1)": (10, 0), "is_recording_past(0)": False, "activate_past_recording()": None,
    "has_previous_state(0)": ValueError, "get_conv_state(0)": ValueError, "get_recurrent_state(0)": ValueError,
    "update_conv_state(None, 0)": ValueError, "update_recurrent_state(None, 0)": ValueError,
    "update_indexer(None, 0)": ValueError, "update(None, None, 0)": NotImplementedError,
    "offload(0, False)": NotImplementedError, "prefetch(0)": NotImplementedError,
    "layers[0].crop(-1)": NotImplementedError, "layers[1].reset()": NotImplementedError, "crop(2)": ValueError,
    "batch_select_indices([0.5])": ValueError, "early_initialization(2, 4, 8, None, None)": None,
}  # fmt: skip


def test_a_cache_answers_truly_or_refuses_what_transformers_asks(both):
    ours, theirs = both
    cache = theirs(tokens(2, 6), use_cache=True).cache
    blockwise = ours.block_size is not None
    expected = ASKED | {"is_sliding": 2 * [blockwise], "is_croppable": not blockwise}
    for question, answer in expected.items():
        ask = partial(eval, f"cache.{question}", {"cache": cache})
        if isinstance(answer, type):
            with pytest.raises(answer) as error:
                ask()
            assert "\n" not in str(error.value)
        else:
            said = ask()
            assert (said() if callable(said) else said) == answer, question
    changing = {"crop", "reset", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"}
    known = {question.partition("(")[0] for question in expected} | changing
    assert {name for name in dir(transformers.Cache) if name[0] != "_"} <= known
    assert cache
    assert XposCache(theirs).batch_size == -1
    assert not XposCache(theirs).is_initialized


CHANGES: dict[str, tuple[Callable[[Any], Any], list[int]]] = {  # of a cache of 2 rows, and the rows that it then has
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "selected": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "copied": (copy.deepcopy, [0, 1]),
    "pickled": (lambda cache: pickle.loads(pickle.dumps(cache)), [0, 1]),
    "reset": (lambda cache: cache.reset(), []),
    "cropped": (lambda cache: cache.crop(-4), [0, 1]),
    "emptied": (lambda cache: cache.crop(-99), []),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_that_was_changed_goes_on_as_one_that_was_filled_so(both, change):
    ours, theirs = both
    act, rows = CHANGES[change]
    columns = {"cropped": 9, "reset": 0, "emptied": 0}.get(change, 13)
    for side in ("left", "right", "middle"):
        words, mask = padded([tokens(7, below=256), tokens(13, below=256)], side)
        cache = theirs(words, attention_mask=mask, use_cache=True).cache
        if change in ("cropped", "emptied") and ours.block_size is not None:
            with pytest.raises(ValueError, match="block_size and window_size must be None to crop a cache"):
                act(cache)
        else:
            cache = act(cache) or cache
            words, mask = words[:, :columns], mask[:, :columns]
            words, mask = (words[rows], mask[rows]) if rows else (words, mask)
            assert cache.get_seq_length() == columns
            assert cache.batch_size == (len(rows) or -1)
        for n in (5, 1):
            new = tokens(len(words), n)
            words, mask = torch.cat((words, new), dim=1), torch.cat((mask, torch.ones_like(new)), dim=1)
            expected = theirs(words, attention_mask=mask).logits[:, -n:]
            assert relative_error(theirs(new, attention_mask=mask, cache=cache).logits, expected) <= CONTRACT


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


def test_documents_packed_by_ids_or_by_positions_that_restart_are_each_as_alone(tmp_path):
    ours, theirs = written(tmp_path), load(tmp_path)
    documents = [tokens(n, below=256) for n in (5, 1, 11, 2)]
    collate = transformers.DataCollatorWithFlattening()
    batch = collate([{"input_ids": document.tolist()} for document in documents])
    packed, labels, positions = batch["input_ids"], batch["labels"], batch["position_ids"]
    alone = torch.cat([ours(document[None])[0] for document in documents])
    loss = torch.nn.functional.cross_entropy(alone[:-1], labels[0, 1:])
    ids = torch.repeat_interleave(torch.tensor([3, 0, 2, 1]), torch.tensor([5, 1, 11, 2]))[None]
    gaps = torch.arange(38)[None] % 2  # padding before each token
    for options in (
        {"position_ids": positions},
        {"position_ids": positions[0] + 7},
        {"document_ids": ids},
        {"document_ids": ids, "position_ids": torch.arange(3, 22)},
    ):
        output = theirs(packed, labels=labels, **options)
        assert relative_error(output.logits[0], alone) <= CONTRACT
        assert output.loss.item() == pytest.approx(loss.item(), rel=1e-5)
        assert torch.equal(theirs(packed, **options).logits, output.logits)
    spread, at = (t.repeat_interleave(2, dim=1) for t in (packed, positions))
    logits = theirs(spread, position_ids=at.masked_fill(gaps == 0, 99), attention_mask=gaps).logits
    assert relative_error(logits[0, 1::2], alone) <= CONTRACT
    plain = {"cache_position": torch.arange(19), "output_attentions": False, "token_type_ids": 0 * packed}
    for options in ({"position_ids": torch.arange(19) + 5}, {"position_ids": torch.arange(19)[None], **plain}):
        assert torch.equal(theirs(packed, **options).logits, ours(packed))


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


ELSEWHERE: dict[str, dict[str, Any]] = {
    "disk": {"device_map": {"": "disk"}},
    "some layers": {"device_map": {"model.embedding": "cpu", "model.head": "cpu", "model.norm": "cpu",
                                   "model.layers.0": "disk", "model.layers.1": "cpu"}},
    "the others": {"device_map": {"model.embedding": "disk", "model.head": "disk", "model.norm": "disk",
                                  "model.layers.0": "cpu", "model.layers.1": "disk"}},
    "buffers too": {"device_map": {"": "disk"}, "offload_buffers": True},
}  # fmt: skip


@pytest.mark.parametrize("options", ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_a_model_with_weights_on_disk_generates_the_same_tokens(both, options, tmp_path):
    pytest.importorskip("accelerate")
    ours, _ = both
    away = load(tmp_path / "model", offload_folder=tmp_path / "away", **options)
    with pytest.raises(ValueError, match="device must be given, and not be meta"):
        away.model.make_cache(2)
    words, (ragged, mask) = tokens(2, 11, below=256), padded([tokens(n, below=256) for n in (3, 11)], "right")
    assert torch.equal(away.generate(words, max_new_tokens=30, **GREEDY), ours.generate(words, 30, temperature=0))
    assert torch.equal(away.model.generate(words, 30, temperature=0), ours.generate(words, 30, temperature=0))
    lengths, beams = torch.tensor([3, 11]), {"max_new_tokens": 9, "num_beams": 3, **GREEDY}
    together = away.generate(ragged, attention_mask=mask, max_new_tokens=9, **GREEDY)
    expected = ours.generate(ragged, 9, lengths=lengths, temperature=0)
    assert torch.equal(together[0, 11:], expected[0, 3:12])
    assert torch.equal(away.generate(words, **beams), load(tmp_path / "model").generate(words, **beams))


@pytest.mark.slow
def test_trainer_lowers_the_loss_resumes_as_if_never_stopped_and_takes_the_best(tmp_path):
    pytest.importorskip("accelerate")
    words = torch.tensor([3, 1, 4, 1, 5]).repeat(6)
    data = [{"input_ids": words.roll(i), "labels": words.roll(i)} for i in range(80)]

    def trainer(folder: str) -> Any:
        torch.manual_seed(0)
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), max_steps=10, learning_rate=0.01, logging_steps=1, report_to=[], use_cpu=True,
            eval_strategy="steps", eval_steps=5, save_steps=5, load_best_model_at_end=folder == "worst",
            metric_for_best_model="eval_loss", greater_is_better=True,  # the best is then the first measured
        )  # fmt: skip
        config = XposConfig(vocab_size=256, embed_dim=32, num_layers=2, num_heads=4, dropout=0.1)
        return transformers.Trainer(XposForCausalLM(config), arguments, train_dataset=data, eval_dataset=data[:4])

    whole, resumed, worst = (trainer(name) for name in ("whole", "resumed", "worst"))
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(256), abs=0.1)
    assert losses[-1] < losses[0] / 2
    resumed.model.model.embedding.weight.data.zero_()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name
    worst.train()
    for trained, checkpoint in ((whole, "whole/checkpoint-10"), (worst, "worst/checkpoint-5")):
        again = Transformer.from_pretrained(tmp_path / checkpoint)
        assert torch.equal(again(words[None]), trained.model.eval()(words[None]).logits)


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


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda f, m: XposForCausalLM.from_pretrained(rewritten(f, model_type="gpt2")), "'xpos_zoo', got 'gpt2'"),
        (lambda f, m: AutoConfig.from_pretrained(rewritten(f, version=2)), "config must have version 3, got 2"),
        (
            lambda f, m: load(rewritten(f, positions={"name": "os.system"})),
            "XPOS or RotaryEmbedding, got {'name': 'os.system'}",
        ),
        (lambda f, m: m(torch.tensor([[3, 300]])), "input_ids must be from 0 to 255, got 3 to 300: of another toke"),
        (lambda f, m: m(tokens(2, 5), attention_mask=tokens(2, 4)), "attention_mask must be (2, 5), got (2, 4)"),
        (lambda f, m: m(tokens(2, 5), cache=transformers.DynamicCache()), "cache must be that of an earlier output, "),
        (
            lambda f, m: m(tokens(2, 5), cache=m(tokens(3, 5), use_cache=True).cache),
            "needs batch_size=2, was made with",
        ),
        (
            lambda f, m: m(tokens(1, 5), attention_mask=torch.full((1, 5), -1.0)),
            "attention_mask must be 1 for tokens and",
        ),
        (lambda f, m: m(tokens(2, 5), attention_maks=None), "unexpected keyword argument 'attention_maks'"),
        (lambda f, m: m(tokens(2, 5), is_causal=False), "unexpected keyword argument 'is_causal'"),
        (lambda f, m: m(tokens(2, 5), output_attentions=True), "output_attentions must be 0 or None"),
        (lambda f, m: m(tokens(2, 5), token_type_ids=tokens(2, 5)), "token_type_ids must be 0 or None"),
        (lambda f, m: m(tokens(2, 5), cache_position=torch.arange(1, 6)), "new tokens, from 0 to 4, got others"),
        (lambda f, m: m(tokens(2, 5), position_ids=tokens(2, 4)), "position_ids must be (2, 5), got (2, 4)"),
        (
            lambda f, m: m(tokens(1, 5), position_ids=torch.arange(5).flip(0)),
            "position_ids must count up by 1, and res",
        ),
        (lambda f, m: m(tokens(1, 5), position_ids=2 * torch.arange(5)), "position_ids must count up by 1, and restar"),
        (
            lambda f, m: m.generate(tokens(1, 5), max_length=9, position_ids=torch.arange(5)[None] % 3),
            "must not restart within a row",
        ),
        (
            lambda f, m: m.generate(tokens(1, 5), max_length=9, document_ids=tokens(1, 5)),
            "document_ids must be None with a cache",
        ),
        (
            lambda f, m: m.generate(
                tokens(1, 9), cache=m(tokens(1, 5), use_cache=True).cache, max_length=12, prompt_lookup_num_tokens=2
            ),
            "cache must be empty with prompt lookup or an assistant",
        ),
        (
            lambda f, m: m.generate(tokens(1, 5), max_length=9, cache_implementation="static"),
            "must be None or 'dynamic', which make a",
        ),
        (lambda f, m: m(), "input_ids or inputs_embeds must be given, not both"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(call, said, tmp_path):
    written(tmp_path)
    with pytest.raises((ValueError, TypeError)) as error:
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
    assert names["said"].shape == (1, 28)
    assert names["cache"].get_seq_length() == 27
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
