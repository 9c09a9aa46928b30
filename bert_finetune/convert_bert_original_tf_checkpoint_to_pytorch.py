"""Convert a BERT of the original TensorFlow release into a folder that `from_pretrained` loads.

    unzip uncased_L-12_H-768_A-12.zip
    python -m bert_finetune.convert_bert_original_tf_checkpoint_to_pytorch \\
        --tf_checkpoint_path uncased_L-12_H-768_A-12 --pytorch_dump_path bert-base-uncased

writes `model.safetensors`, `config.json`, the tokenizer's files and `vocab.txt`. TensorFlow is not needed. The heads of
pre-training (masked words, next sentence) are kept when the checkpoint has them, as a `BertForPreTraining`; without
them the folder holds a `BertModel`. `AutoModel` and `AutoModelForSequenceClassification` load both.
"""

import argparse

from bert_finetune.errors import ArgumentParser, reports_input_errors


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tf_checkpoint_path", required=True, help="the release's folder, prefix or .index file")
    parser.add_argument("--bert_config_file", help="default: bert_config.json beside the checkpoint")
    parser.add_argument("--pytorch_dump_path", required=True, help="the folder to write")
    parser.add_argument(
        "--do_lower_case",
        choices=("true", "false"),
        help="whether the model is uncased; default: as bert_config.json, the folder's name or the vocabulary says",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the result of an earlier conversion")
    options = parser.parse_args(arguments)

    from transformers.utils import logging

    from bert_finetune.tf_conversion import convert_tf_checkpoint_to_pytorch

    logging.disable_progress_bar()
    convert_tf_checkpoint_to_pytorch(
        options.tf_checkpoint_path,
        options.bert_config_file,
        options.pytorch_dump_path,
        {"true": True, "false": False, None: None}[options.do_lower_case],
        options.overwrite,
    )


if __name__ == "__main__":
    main()
