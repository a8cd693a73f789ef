"""Make the text encoder that the training starts from: `python text_encoder.py MINILM DATASET OUTPUT`.

MINILM is sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), a Hub id or a folder. OUTPUT gets the same six layers with a
vocabulary of 12,000 pieces instead of 30,522: those that the captions of DATASET (made by dataset.py) use, letters and
signs, then the most frequent English ones. Other words are spelled with pieces. This saves 14 MB of float16 weights.
"""

import json
import re
import sys
from pathlib import Path

from transformers import AutoTokenizer, BertModel

from hf_ae.data import open_dataset

PIECES, LENGTH = 12_000, 64


def main(source: str, dataset: str, output: Path):
    tokenizer = AutoTokenizer.from_pretrained(source)
    kept = wanted_pieces(tokenizer, captions(dataset))
    model = BertModel.from_pretrained(source)
    for table, rows in ((model.embeddings.word_embeddings, kept), (model.embeddings.position_embeddings, range(LENGTH))):
        table.weight.data = table.weight.data[list(rows)].clone()
        table.num_embeddings = len(rows)
    model.embeddings.position_ids = model.embeddings.position_ids[:, :LENGTH]
    model.embeddings.token_type_ids = model.embeddings.token_type_ids[:, :LENGTH]
    model.config.vocab_size, model.config.max_position_embeddings = len(kept), LENGTH
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    renumber(output / "tokenizer.json", {old: new for new, old in enumerate(kept)})
    settings = json.loads((output / "tokenizer_config.json").read_text())
    settings["model_max_length"] = LENGTH
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    print(f"{output}: {len(kept)} pieces, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million weights.")


def captions(dataset: str) -> list[str]:
    parts = open_dataset(dataset)
    rows = [row for part in parts.values() for row in part.remove_columns("image")]
    return [text for row in rows for text in (row["text"], *row["keywords"])]


def wanted_pieces(tokenizer, texts: list[str]) -> list[int]:
    """Numbers of the pieces to keep, in their old order, which is that of frequency."""
    pieces = {number: piece for piece, number in tokenizer.get_vocab().items()}
    used = {number for ids in tokenizer(texts)["input_ids"] for number in ids} | set(tokenizer.all_special_ids)
    used |= {number for number, piece in pieces.items() if re.fullmatch(r"(##)?[!-~]", piece)}
    for number in sorted(pieces):
        if len(used) >= PIECES:
            break
        if re.fullmatch(r"(##)?[a-z']+", pieces[number]):
            used.add(number)
    return sorted(used)


def renumber(path: Path, new: dict[int, int]):
    """Rewrite tokenizer.json with the kept pieces under their new numbers."""
    tokens = json.loads(path.read_text())
    tokens["model"]["vocab"] = {piece: new[number] for piece, number in tokens["model"]["vocab"].items() if number in new}
    for token in tokens["added_tokens"]:
        token["id"] = new[token["id"]]
    for special in tokens["post_processor"].get("special_tokens", {}).values():
        special["ids"] = [new[number] for number in special["ids"]]
    if tokens.get("padding"):
        tokens["padding"]["pad_id"] = new[tokens["padding"]["pad_id"]]
    path.write_text(json.dumps(tokens))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
