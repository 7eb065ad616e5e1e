"""Train the small language model behind `cenote.models.tiny_decoder` and write its folder.

It learns two things at once: the prose of the embedded manuals (the pages of `seen_texts` alone), and to tell facts that
`cenote.core.planted` puts into that prose and asks for behind it. Short texts come first: recall is learned there, and carried
to long ones; a stage ends when its answers are told. On one thread of a processor. The folder is written after each stage, with
what the model reaches and how long it took.

    python scripts/train_tiny_decoder.py
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import save
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cenote.core.files import write_whole
from cenote.core.planted import CITIES, QUESTION, SENTENCE, FactPrompts, planted, prompts, recalled
from cenote.features.manuals import seen_texts, unseen_texts
from cenote.models.tiny_decoder import FOLDER

WORD = Regex(r"\n|\p{L}+|\p{N}|[^\s\p{L}\p{N}]")
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
WIDTH, LAYERS, HEADS, KEY_HEADS, HIDDEN = 128, 3, 4, 2, 256
POSITIONS = 1024
ROTARY = 1e6
RANDOM, LOOK_BACK, LOOK_UP, COPY = 0.05, 6.0, 0.9, 8.0  # at the beginning: size of weights, and of what layers look for
LEARNING_RATE, LOOKING_RATE, WARMUP, BETAS, WEIGHT_DECAY = 2e-3, 5e-4, 100, (0.9, 0.98), 0.05
PROSE_WEIGHT, PROSE_SHARE = 0.3, 0.25  # so that pages are not learned by heart while recall is learned
SEED = 0
TESTED = 1000  # seeds of facts: below, of tests; from there on, of training


class Stage(NamedTuple):
    """Texts of one kind.

    Attributes:
        facts: planted in each.
        prose: the fewest and the most tokens around them.
        batch: texts per step.
        steps: the most.
        until: moving average of the loss of answers at which it ends.
    """

    facts: int
    prose: tuple[int, int]
    batch: int
    steps: int
    until: float = 0.0


STAGES = (
    Stage(3, (8, 16), 16, 3000, 0.2),
    Stage(5, (16, 96), 24, 600, 0.15),
    Stage(8, (64, 320), 12, 400, 0.15),
    Stage(8, (128, 800), 6, 300),
)
BRIEF = (Stage(2, (8, 16), 8, 5), Stage(3, (16, 32), 4, 5))


def learned_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Words that stand in the texts at least twice, those of questions, cities; digits one by one, signs, line breaks."""
    split = pre_tokenizers.Split(WORD, "removed", invert=True)
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    asked = [word for word, _ in split.pre_tokenize_str(QUESTION.format(city=""))]
    often = sorted(word for word, count in counts.items() if count > 1)
    names = dict.fromkeys([UNKNOWN, BEGIN, END, "\n", ".", *"0123456789", *asked, *CITIES, *often])
    rules = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, UNKNOWN))
    rules.pre_tokenizer = split
    rules.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=rules,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        model_max_length=POSITIONS,
    )


def untrained(tokenizer: Any) -> LlamaForCausalLM:
    """The model before its first step: random, but for two layers that begin as `look_back` and `look_up` say."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KEY_HEADS,
            intermediate_size=HIDDEN,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            initializer_range=RANDOM,
            rope_parameters={"rope_type": "default", "rope_theta": ROTARY},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.2
            layer.mlp.down_proj.weight *= 0.1
        look_up(model, look_back(model))
    return model


def look_back(model: LlamaForCausalLM) -> Float[Tensor, "width"]:
    """Let head h of the first layer carry on the token h + 1 places before, whatever stands there.

    Every embedding is given the same direction beside its own, which is returned; keys turn it into a fixed vector, queries
    into that vector turned by the rotary angles of h + 1 places. Recall needs such heads, and training finds them late.
    """
    embeddings, attention = model.model.embed_tokens.weight, model.model.layers[0].self_attn
    shared = F.normalize(torch.randn(WIDTH), dim=0)
    embeddings += RANDOM * WIDTH**0.5 * shared - (embeddings @ shared)[:, None] * shared
    head, pairs = WIDTH // HEADS, 4  # the fastest of the rotary angles: they tell neighbours apart
    angles = model.model.rotary_emb.inv_freq[:pairs]
    size = (LOOK_BACK * head**0.5 / (WIDTH / 2)) ** 0.5  # tokens have WIDTH / 2 of the shared direction, squared
    key, queries = torch.zeros(head), torch.zeros(HEADS, head)
    key[:pairs] = size
    for places, query in enumerate(queries, 1):
        query[:pairs] = size * (angles * places).cos()
        query[head // 2 : head // 2 + pairs] = -size * (angles * places).sin()
    attention.k_proj.weight.mul_(0.2).add_(key.repeat(KEY_HEADS)[:, None] * shared)
    attention.q_proj.weight.mul_(0.2).add_(queries.flatten()[:, None] * shared)
    values = nn.init.orthogonal_(torch.empty(head, WIDTH))
    attention.v_proj.weight.copy_((values - (values @ shared)[:, None] * shared).repeat(KEY_HEADS, 1))
    attention.o_proj.weight.copy_(2 * RANDOM * nn.init.orthogonal_(torch.empty(WIDTH, WIDTH)))
    return shared


def look_up(model: LlamaForCausalLM, shared: Float[Tensor, "width"]) -> None:
    """Let the second layer read what stood behind the last tokens before: at "for Oslo is 4", what followed that in the text.

    The token itself and those one, two and three places before are compared with those one to four places before a key, in the
    slowest rotary angles, which hold over long distances. What is read is put out as it was.
    """
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    head, pairs = WIDTH // HEADS, 10
    slow = torch.cat([torch.arange(head // 2 - pairs, head // 2), torch.arange(head - pairs, head)])
    carried = [block.T for block in F.normalize(first.o_proj.weight, dim=0).split(head, 1)]
    for group in range(KEY_HEADS):
        queries, keys = torch.zeros(head, WIDTH), torch.zeros(head, WIDTH)
        for at_query, at_key in zip([first.v_proj.weight[:head], *carried[:-1]], carried, strict=True):
            mixed = LOOK_UP * torch.randn(len(slow), head) / len(slow) ** 0.5
            queries[slow] += mixed @ at_query
            keys[slow] += mixed @ at_key
        for weight in (queries, keys):
            weight -= (weight @ shared)[:, None] * shared
        second.k_proj.weight[group * head : (group + 1) * head] = keys
        share = HEADS // KEY_HEADS * head
        second.q_proj.weight[group * share : (group + 1) * share] = queries.repeat(HEADS // KEY_HEADS, 1)
    nn.init.orthogonal_(second.v_proj.weight)
    read = second.v_proj.weight.view(KEY_HEADS, 1, head, WIDTH).expand(-1, HEADS // KEY_HEADS, -1, -1)
    second.o_proj.weight.copy_(COPY * RANDOM * read.reshape(WIDTH, WIDTH).T)


class Prose:
    """Pieces of pages by their number of tokens, each from the beginning of a sentence.

    Args:
        tokenizer: which counts.
        texts: the pages.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        def counted(words: list[str]) -> list[tuple[str, int]]:
            return list(zip(words, map(len, tokenizer(words, add_special_tokens=False)["input_ids"]), strict=True))

        self.pages = [[counted(sentence.split()) for sentence in SENTENCE.split(text)] for text in texts]

    def draw(self, tokens: int, draw: random.Random) -> list[str]:
        """Texts of at least so many tokens, a word more at the most."""
        texts: list[str] = []
        while tokens > 0:
            page = draw.choice(self.pages)
            taken = []
            for word, count in (pair for s in page[draw.randrange(len(page)) :] for pair in s):
                if tokens <= 0:
                    break
                taken.append(word)
                tokens -= count
            texts.append(" ".join(taken))
        return texts


def batch_of(
    stage: Stage, tokenizer: Any, prose: Prose, draw: random.Random
) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
    """Texts with all their questions behind them, in any order, and which tokens are answers; padded behind."""
    digits = set(tokenizer.convert_tokens_to_ids(list("0123456789")))
    rows, answers = [], []
    for _ in range(stage.batch):
        texts = prose.draw(draw.randint(*stage.prose), draw)
        made = planted(texts, stage.facts, seed=draw.randrange(TESTED, 2**31))
        asked = [f"\n{question}{answer}" for question, answer in zip(made.questions, made.answers, strict=True)]
        before = tokenizer(made.text)["input_ids"]
        behind = tokenizer("".join(draw.sample(asked, len(asked))), add_special_tokens=False)["input_ids"]
        rows.append(torch.tensor(before + behind))
        answers.append(torch.tensor([False] * len(before) + [token in digits for token in behind]))
    pad = nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id), pad(answers, batch_first=True)


def losses(
    model: LlamaForCausalLM,
    ids: Int[Tensor, "batch tokens"],
    answers: Bool[Tensor, "batch tokens"],
    draw: torch.Generator,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean of `-log p` of the answers, and of some of the other tokens."""
    states, ahead, asked = model.model(ids).last_hidden_state[:, :-1], ids[:, 1:], answers[:, 1:]
    other = (torch.rand(asked.shape, generator=draw) < PROSE_SHARE) & ~asked & (ahead != model.config.pad_token_id)
    told, read = (F.cross_entropy(model.lm_head(states[at]), ahead[at]) for at in (asked, other))
    return told, read


@torch.no_grad()
def share_told(model: Any, asked: FactPrompts) -> float:
    """How many of the facts a model tells that reads everything."""

    def tell(context: Tensor, prompt: Tensor, mask: Tensor) -> Tensor:
        assert bool(mask.all())
        whole = torch.cat([context.expand(len(prompt), -1), prompt], 1)
        return model.lm_head(model.model(whole).last_hidden_state[:, context.shape[1] :])

    return recalled(tell, asked).right.float().mean().item()


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Per token, of each text by itself."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        total += F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


def reached(model: Any, tokenizer: Any, texts: Sequence[str], sizes: Sequence[int], cases: int) -> dict[str, float]:
    """Of pages that it has not seen: the share of 8 facts told in texts of some lengths, and the perplexity."""
    prose, found = Prose(tokenizer, texts), {}
    for size in sizes:
        told = [
            share_told(model, prompts(tokenizer, planted(prose.draw(size, random.Random(seed)), 8, seed=seed)))
            for seed in range(cases)
        ]
        found[f"told_of_8_in_{size}_tokens_of_prose"] = round(sum(told) / cases, 4)
    return {**found, "perplexity_of_unseen_pages": round(perplexity(model, tokenizer, texts), 2)}


def store(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, record: dict[str, Any]) -> None:
    """A folder that transformers reads, weights in half precision."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)
    tensors = {
        name: value.half().contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"
    }
    content = save(tensors, {"format": "pt", "training": json.dumps(record)})
    write_whole(out / "model.safetensors", content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--brief", action="store_true", help="A few steps, to see that everything runs.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    tokenizer = learned_tokenizer(seen_texts())
    prose = Prose(tokenizer, seen_texts())
    draw, generator = random.Random(SEED), torch.Generator().manual_seed(SEED)
    model = untrained(tokenizer)
    looking = [weight for name, weight in model.named_parameters() if "q_proj" in name or "k_proj" in name]
    others = [weight for weight in model.parameters() if all(weight is not other for other in looking)]
    rates = {LOOKING_RATE: looking, LEARNING_RATE: others}
    groups = [{"params": weights, "lr": rate} for rate, weights in rates.items()]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=WEIGHT_DECAY)
    stages = BRIEF if given.brief else STAGES
    step, tokens = 0, 0
    for stage in stages:
        model.train()
        smooth = 0.0
        for number in range(stage.steps):
            share = min(1.0, (step + 1) / WARMUP)
            if stage is stages[-1]:
                share *= 1 - number / stage.steps
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = share * rate
            ids, answers = batch_of(stage, tokenizer, prose, draw)
            told, read = losses(model, ids, answers, generator)
            (told + PROSE_WEIGHT * read).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step, tokens = step + 1, tokens + ids.numel()
            smooth = told.item() if number == 0 else smooth + 0.1 * (told.item() - smooth)
            if step % 25 == 0:
                print(
                    f"step {step}, {tokens:,} tokens, {time.process_time() - start:.0f} s: loss {smooth:.3f} of answers, "
                    f"{read.item():.3f} of other tokens",
                    flush=True,
                )
            if number >= 20 and smooth < stage.until:
                break
        model.eval()
        sizes, cases = ((30,), 1) if given.brief else ((100, 400, 780), 4 if stage is not stages[-1] else 25)
        record = {
            "steps": step,
            "tokens": tokens,
            "seconds_of_one_thread": round(time.process_time() - start),
            "stages": [stage._asdict() for stage in stages[: stages.index(stage) + 1]],
            "learning_rate": LEARNING_RATE,
            "seed": SEED,
            **reached(model.half().float(), tokenizer, unseen_texts()[: 2 if given.brief else None], sizes, cases),
            "torch": str(torch.__version__),
            "data": "seen_texts of the embedded manuals; facts of cenote.core.planted",
            "made_by": "scripts/train_tiny_decoder.py",
        }
        store(model, tokenizer, given.out, record)
        print(json.dumps(record), flush=True)
    size = sum(path.stat().st_size for path in given.out.iterdir())
    print(f"{given.out}: {size:,} bytes, {time.process_time() - start:.0f} s of one thread")


if __name__ == "__main__":
    main()
