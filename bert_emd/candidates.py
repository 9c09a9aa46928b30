"""What may stand in a word's place: what a masked language model expects there, or the words nearest in meaning."""

import hashlib
import itertools
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
import torch
from tokenizers import Encoding, Tokenizer
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from bert_emd.recipes import has_bf16
from bert_finetune.architectures import check_vocabulary, longest_input
from bert_finetune.checkpoints import load_pretrained, load_tokenizer
from bert_finetune.data import plain_backend
from bert_finetune.digests import weights_digest
from bert_finetune.errors import InputError, reading
from bert_finetune.half_precision import needs_float32

# Of a file of word vectors, whose lines stand in order of the words' frequency, so many are read, as TinyBERT does.
LINES = 100_000
# Most words to be predicted in one forward pass: what it takes is their number times the vocabulary's size.
_MOST_MASKS = 2048
# Words that are compared with all others at a time.
_PRODUCTS = 256
# A letter with the marks that belong to it, in any alphabet.
LETTER = r"(?:\p{L}\p{M}*)"
_LETTERS = regex.compile(f"{LETTER}+")


class Word(NamedTuple):
    """A word of a text, which is text[start:end]."""

    start: int
    end: int
    text: str


class Place(NamedTuple):
    """A word among the pieces of its text: pieces[first:end]."""

    first: int
    end: int
    word: Word


@dataclass(frozen=True)
class Question:
    """Pieces of a text, and the words of it that are to be hidden, in order."""

    pieces: list[int]
    places: list[Place]


class MaskedLM:
    """Candidates from context. The model reads a pair: the text with words hidden by a mask each, of however many
    pieces they are, and the text as it is, which tells it what is meant.

    `count` candidates a word (fewer where the vocabulary has no more): the most likely pieces that are whole words of
    letters, and not the word itself; computed in bfloat16 where the machine has it. faithful, in float32: what is left
    of the `count` most likely pieces without those that continue a word, as TinyBERT's data_augmentation.py has it; the
    word itself may be among them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        count: int,
        batch_size: int = 100,
        faithful: bool = False,
    ):
        self.model, self.count, self.batch_size, self.faithful = model, count, batch_size, faithful
        self._in_bf16 = (
            not faithful and has_bf16(use_cpu=model.device.type == "cpu") and not needs_float32(model.config)
        )
        self._backend = plain_backend(tokenizer)
        self._mask, self._pad = tokenizer.mask_token_id, tokenizer.pad_token_id or 0
        self._with_types = "token_type_ids" in tokenizer.model_input_names
        self._template = _template(self._backend)
        specials = sum(source is None for source, *_ in self._template)
        # Of a text's pieces so many fit, for it is there twice.
        self.room = (longest_input(model) - specials) // 2
        self._texts, self._alone = pieces_as_text(self._backend, len(tokenizer))
        self._is_word = [alone and is_of_letters(text) for text, alone in zip(self._texts, self._alone, strict=True)]
        spellings = Counter(text.casefold() for text, word in zip(self._texts, self._is_word, strict=True) if word)
        self._spellings = max(spellings.values(), default=0)

    @property
    def made_of(self) -> dict[str, str]:
        """What its answers follow from beside its settings and the questions."""
        return {
            "weights": weights_digest(self.model),
            "tokenizer": hashlib.sha256(self._backend.to_str().encode()).hexdigest(),
            "computed on": self.model.device.type,
            "computed in": "bfloat16" if self._in_bf16 else "float32",
        }

    @classmethod
    def load(cls, name_or_path: str, *settings) -> "MaskedLM":
        """A model folder's, or hub name's, on the GPU if there is one; `settings` from `count` on.

        Raises InputError for one that has no head, no mask, or fewer embeddings than its tokenizer has pieces.
        """
        model = load_pretrained(AutoModelForMaskedLM, name_or_path, "--masked_lm")
        tokenizer = load_tokenizer(name_or_path, "--masked_lm")
        if tokenizer.mask_token is None:
            raise InputError(f"--masked_lm {name_or_path}: its tokenizer has no mask; give a masked language model")
        check_vocabulary(model, tokenizer, f"--masked_lm {name_or_path}")
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, *settings)

    def split(self, texts: list[str]) -> list[Encoding]:
        """Texts to pieces, without special ones. A blank is put before each, to be taken account of in the offsets:
        so that a first word has the pieces that it has elsewhere."""
        return self._backend.encode_batch([" " + text for text in texts], add_special_tokens=False)

    def predict(self, questions: list[Question]) -> list[list[list[str]]]:
        """The candidates for each word that each question hides, the most likely first."""
        sequences = [self._sequence(question) for question in questions]
        answers = [[] for _ in questions]
        for batch in self._batches(sequences):
            top = self._most_likely([sequences[k] for k in batch])
            asked = ((k, place) for k in batch for place in questions[k].places)
            for (k, place), pieces in zip(asked, top, strict=True):
                answers[k].append(self._chosen(pieces, questions[k].pieces[place.first : place.end], place.word.text))
        return answers

    def _chosen(self, pieces: list[int], own: list[int], word: str) -> list[str]:
        if self.faithful:
            return [self._texts[piece] for piece in pieces if self._alone[piece]]
        folded = word.casefold()
        found = [self._texts[piece] for piece in pieces if self._is_word[piece] and [piece] != own]
        return [text for text in found if text.casefold() != folded][: self.count]

    def _sequence(self, question: Question) -> tuple[list[int], list[int], list[int]]:
        """A pair's pieces, their types, and where the masks are."""
        hidden, masks, done = [], [], 0
        for first, end, _ in question.places:
            hidden += question.pieces[done:first]
            masks.append(len(hidden))
            hidden.append(self._mask)
            done = end
        copies = [hidden + question.pieces[done:], question.pieces]
        ids, types, begins = [], [], {}
        for source, piece, kind in self._template:
            begins[source] = len(ids)
            added = [piece] if source is None else copies[source]
            ids += added
            types += [kind] * len(added)
        return ids, types, [begins[0] + mask for mask in masks]

    def _batches(self, sequences: list[tuple]) -> Iterator[list[int]]:
        """The sequences' numbers, those of similar length together."""
        batch, masks = [], 0
        for k in sorted(range(len(sequences)), key=lambda k: len(sequences[k][0])):
            more = len(sequences[k][2])
            if batch and (len(batch) == self.batch_size or masks + more > _MOST_MASKS):
                yield batch
                batch, masks = [], 0
            batch.append(k)
            masks += more
        if batch:
            yield batch

    @torch.inference_mode()
    def _most_likely(self, sequences: list[tuple[list[int], list[int], list[int]]]) -> list[list[int]]:
        """For each mask the pieces to choose from, the most likely first."""
        device = self.model.device
        ids, types, masks = zip(*sequences, strict=True)
        inputs = {"input_ids": _padded(ids, self._pad), "attention_mask": _padded([[1] * len(row) for row in ids], 0)}
        if self._with_types:
            inputs["token_type_ids"] = _padded(types, 0)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        rows = [row for row, here in enumerate(masks) for _ in here]
        columns = [mask for here in masks for mask in here]

        def keep_masks(module, args, output):
            output.last_hidden_state = output.last_hidden_state[rows, columns][None]
            return output

        # Whatever head comes behind the encoder, it now sees one sequence of nothing but the masks.
        hook = self.model.base_model.register_forward_hook(keep_masks)
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=self._in_bf16):
                logits = self.model(**inputs, return_dict=True).logits[0]
        finally:
            hook.remove()
        logits, count = logits[:, : len(self._is_word)], self.count  # some vocabularies are padded
        if not self.faithful:
            logits = logits.masked_fill(~torch.tensor(self._is_word, device=device), -torch.inf)
            count += self._spellings + 1  # which may fall away for being the word itself
        return logits.topk(min(count, logits.shape[-1])).indices.tolist()


def _padded(rows: Iterable[list[int]], padding: int) -> torch.Tensor:
    return pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=padding)


def _template(backend: Tokenizer) -> list[tuple[int | None, int, int]]:
    """How the tokenizer puts a pair together: (None, a special piece, its type), or (0 or 1, -, the text's type)."""
    pair = backend.encode("a", "a")
    parts = itertools.groupby(zip(pair.sequence_ids, pair.ids, pair.type_ids, strict=True), key=lambda part: part[0])
    return [part for source, group in parts for part in (group if source is None else [next(group)])]


def is_of_letters(text: str) -> bool:
    """Whether a text is letters, with their marks, and nothing else."""
    return _LETTERS.fullmatch(text) is not None


def pieces_as_text(backend: Tokenizer, size: int) -> tuple[list[str], list[bool]]:
    """The text of each piece of a vocabulary, and whether it stands alone: whether that text, after a blank, is just
    this piece. What continues a word does not (`##ing`, and in RoBERTa's way what has no blank before it)."""
    texts = [text.strip() for text in backend.decode_batch([[k] for k in range(size)], skip_special_tokens=False)]
    again = backend.encode_batch([" " + text for text in texts], add_special_tokens=False)
    return texts, [encoding.ids == [k] for k, encoding in enumerate(again)]


def places_of(words: Iterable[Word], pieces: Encoding) -> list[Place]:
    """Where words are among the pieces of their text."""
    begins, ends = zip(*pieces.offsets, strict=True) if pieces.offsets else ((), ())
    # The blank that `MaskedLM.split` puts before the text counts in the offsets.
    return [Place(bisect_right(ends, word.start + 1), bisect_left(begins, word.end + 1), word) for word in words]


def windows(pieces: list[int], places: list[Place], room: int) -> Iterator[tuple[list[int], list[Place]]]:
    """A text as parts of at most `room` pieces: each word is in one of them, and the first word of a further part is
    its beginning. No word may have more pieces than that."""
    begin, here = 0, []
    for place in places:
        if place.end - begin > room:
            if here:
                yield pieces[begin : begin + room], here
            begin, here = place.first, []
        here.append(Place(place.first - begin, place.end - begin, place.word))
    if here:
        yield pieces[begin : begin + room], here


class WordVectors:
    """Candidates from meaning: the `count` words of letters with the nearest vectors by cosine, the word itself apart.

    words, vectors: n words and their vectors, (n, width).
    """

    def __init__(self, words: list[str], vectors: torch.Tensor, count: int):
        self.words, self.count = words, count
        self._vectors = functional.normalize(vectors, dim=1)
        self._rows = {word: row for row, word in reversed(list(enumerate(words)))}
        # Twice as many as are asked for, because of the word itself in other spellings.
        self._nearest = min(2 * count + 1, len(words))
        self._found: dict[str, list[str]] = {}

    @classmethod
    def load(cls, name: str, count: int) -> "WordVectors":
        """Of a file in GloVe's text format, or the input embeddings of a model's whole words (a folder or hub name).

        Raises InputError for what is neither, and for a file with a line that is not as the others are.
        """
        words, vectors = _read_vectors(Path(name)) if Path(name).is_file() else _embeddings(name)
        if not words:
            raise InputError(f"--word_vectors {name}: holds no vector of a word of letters")
        return cls(words, vectors, count)

    def nearest(self, words: Iterable[str]) -> dict[str, list[str]]:
        """The candidates for each word, the nearest first; none for one that is not there, in lower case neither."""
        known = {word: word if word in self._rows else word.lower() for word in words}
        new = sorted({word for word in known.values() if word in self._rows and word not in self._found})
        for k in range(0, len(new), _PRODUCTS):
            some = new[k : k + _PRODUCTS]
            cosines = self._vectors[[self._rows[word] for word in some]] @ self._vectors.T
            for word, near in zip(some, cosines.topk(self._nearest).indices.tolist(), strict=True):
                others = [self.words[row] for row in near if self.words[row].casefold() != word.casefold()]
                self._found[word] = others[: self.count]
        return {word: self._found.get(there, []) for word, there in known.items()}

    @property
    def digest(self) -> str:
        """SHA-256 of words and vectors."""
        return hashlib.sha256("\n".join(self.words).encode() + self._vectors.numpy().tobytes()).hexdigest()


def _embeddings(name_or_path: str) -> tuple[list[str], torch.Tensor]:
    option = "--word_vectors"
    model, tokenizer = load_pretrained(AutoModel, name_or_path, option), load_tokenizer(name_or_path, option)
    check_vocabulary(model, tokenizer, f"{option} {name_or_path}")
    texts, alone = pieces_as_text(plain_backend(tokenizer), len(tokenizer))
    rows = [row for row, text in enumerate(texts) if alone[row] and is_of_letters(text)]
    return [texts[row] for row in rows], model.get_input_embeddings().weight.detach()[rows]


def _read_vectors(path: Path) -> tuple[list[str], torch.Tensor]:
    """The words of letters in the first LINES lines, and their vectors. A line is a word, which may have blanks in it,
    and its numbers; a first line of two numbers, as word2vec's and fastText's files have, is none."""
    words, vectors, width = [], [], 0
    with reading(str(path)), open(path, "rb") as file:
        for number, line in enumerate(itertools.islice(file, LINES), 1):
            place = f"{path}, line {number}"
            fields = line.split()
            if number == 1 and len(fields) == 2 and all(field.isdigit() for field in fields):
                continue
            width = width or len(fields) - 1
            named, numbers = fields[: len(fields) - width], fields[len(fields) - width :]
            if width < 1 or not named or any(map(_is_number, named[1:])):
                raise InputError(
                    f"{place}: not a word and {width or 'some'} numbers, as the first line; mend or remove it"
                )
            try:
                word = b" ".join(named).decode()
                if is_of_letters(word):
                    vectors.append(np.array(numbers, dtype=np.float32))
                    words.append(word)
            except ValueError as error:
                raise InputError(f"{place}: {error}; there must be a word and {width} numbers, in UTF-8") from error
            if is_of_letters(word) and not np.isfinite(vectors[-1]).all():
                raise InputError(f"{place}: the vector of {word} holds NaN or infinity; mend or remove the line")
    return words, torch.from_numpy(np.array(vectors))


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
