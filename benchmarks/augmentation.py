"""How fast augmentation finds its candidates, against TinyBERT's way: a forward pass for each word.

    python benchmarks/augmentation.py

The same sentences, the quickstart's, are put to masked language models with random weights in both ways, in turns,
after a turn that is not timed; the median of the turns' ratios counts. TinyBERT's way is a loop over the words of one
piece: one sequence, the head at all its positions, the most likely pieces at the mask. It is spared what TinyBERT's
code does beside that, gradients. Where the machine has bfloat16, in which ours computes, it is timed in float32, as
TinyBERT's code has it, and in bfloat16. Ours is `Candidates.slots`, which asks about words of several pieces too.
Writes augmentation.json and augmentation.md into --output_dir; takes about three minutes.
"""

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

sys.path.append(str(Path(__file__).resolve().parents[1]))
import quickstart
from bert_emd.augmentation import Candidates, words_of
from bert_emd.candidates import MaskedLM
from bert_emd.recipes import has_bf16
from bert_finetune.errors import ArgumentParser, InputError, reports_input_errors
from bert_finetune.files import write_atomically, write_json
from bert_finetune.footprint import processor_name

SHAPES = {
    "6 x 384": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "12 x 768": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
CANDIDATES = 15


class WordByWord:
    """A pass for each word of one piece, in bfloat16 or float32."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, in_bf16: bool):
        self.model, self.tokenizer, self.in_bf16 = model, tokenizer, in_bf16

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> None:
        for text in texts:
            for start, end, word in words_of(text):
                if len(self.tokenizer.tokenize(word)) > 1:
                    continue
                hidden = f"{text[:start]}{self.tokenizer.mask_token}{text[end:]}"
                inputs = self.tokenizer(hidden, text, return_tensors="pt", truncation=True)
                with torch.autocast("cpu", torch.bfloat16, enabled=self.in_bf16):
                    logits = self.model(**inputs).logits[0]
                (mask,) = torch.nonzero(inputs["input_ids"][0] == self.tokenizer.mask_token_id)[:1, 0]
                self.tokenizer.convert_ids_to_tokens(logits[mask].topk(CANDIDATES).indices)


def measure(tokenizer: PreTrainedTokenizerBase, shape: dict, texts: list[str], few: list[str], rounds: int) -> dict:
    """Sentences a second in each way, medians, and how many times as fast ours is as each other, medians of the turns;
    word by word only the `few` sentences."""
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **shape)).eval()
    precisions = {"float32": False} | ({"bfloat16": True} if has_bf16(use_cpu=True) else {})
    ways: dict[str, tuple[Callable, list[str]]] = {
        f"a pass a word, {name}": (WordByWord(model, tokenizer, in_bf16), few) for name, in_bf16 in precisions.items()
    }
    ways["ours"] = Candidates(MaskedLM(model, tokenizer, CANDIDATES), None).slots, texts
    speeds = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, (work, sentences) in ways.items():
            begin = time.perf_counter()
            work(sentences)
            if turn:
                speeds[name].append(len(sentences) / (time.perf_counter() - begin))
    ratios = {
        f"times as fast as {name}": [ours / theirs for ours, theirs in zip(speeds["ours"], values, strict=True)]
        for name, values in speeds.items()
        if name != "ours"
    }
    return {name: statistics.median(values) for name, values in (speeds | ratios).items()}


def as_markdown(found: dict) -> str:
    columns = list(next(iter(found["models"].values())))
    rows = [["masked language model", *columns], ["---"] * (1 + len(columns))]
    rows += [[name, *(f"{row[column]:.3g}" for column in columns)] for name, row in found["models"].items()]
    rows = ["| " + " | ".join(row) + " |" for row in rows]
    rows += [
        "",
        f"Sentences a second: {found['sentences']} sentences in batches of 100, {found['few']} of them word by word; "
        f"medians of {found['rounds']} rounds in turns. {found['processor']}, threads: {found['threads']}; load "
        f"{found['load']:.1f} before it began.",
    ]
    return "\n".join(rows) + "\n"


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=300, help="for ours (300)")
    parser.add_argument("--few", type=int, default=6, help="of them for a pass a word (6)")
    parser.add_argument("--rounds", type=int, default=3, help="timed (3)")
    parser.add_argument("--tokenizer", default=quickstart.MODEL, help="BERT's uncased one")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).resolve().parent, help="(benchmarks)")
    options = parser.parse_args(argv)
    if not 1 <= options.few <= options.sentences or options.rounds < 1:
        raise InputError("--sentences, --few, --rounds: must be 1 or more, and --few no more than --sentences")
    load = os.getloadavg()[0]
    quickstart.fetch_text()
    if options.tokenizer == quickstart.MODEL:
        quickstart.fetch_model()
    sentences = [text for text, _ in quickstart.rated(quickstart.SENTENCES.read_text(encoding="utf-8"))]
    texts = sorted(random.Random(0).sample(sentences, options.sentences), key=len)
    few = [texts[int((k + 0.5) * len(texts) / options.few)] for k in range(options.few)]
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    found = {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "load": load,
        **{name: getattr(options, name) for name in ("sentences", "few", "rounds")},
        "models": {name: measure(tokenizer, shape, texts, few, options.rounds) for name, shape in SHAPES.items()},
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "augmentation.json", found)
    write_atomically(options.output_dir / "augmentation.md", as_markdown(found))
    print(as_markdown(found))


if __name__ == "__main__":
    main()
