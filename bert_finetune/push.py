"""A finished run's folder, sent to the Hugging Face hub at the very end of its script."""

import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd, auth_check, create_branch, create_commit, create_repo, model_info

from bert_finetune.errors import InputError
from bert_finetune.files import read_json
from bert_finetune.hub import HUB_FAILURES, push_reason
from bert_finetune.model_card import name_in_card
from bert_finetune.outputs import pushed_files
from bert_finetune.paths import run_for_others
from bert_finetune.run_arguments import RunArguments


def open_repository(args: RunArguments, model: str | None) -> None:
    """With `--push_to_hub`, make sure that the model can be sent, before anything else is done: its repository and
    branch exist, made where they did not, and the token may write there.

    model: what a run without training looks at; None for the model in the output folder. Raises InputError where the
    model cannot be sent, or would not be the one looked at, or would be public against `--hub_private_repo`.
    """
    if not args.push_to_hub or args.process_index != 0:
        return
    folder = Path(args.output_dir)
    if not args.do_train and model is not None and Path(model).resolve() != folder.resolve():
        raise InputError(f"--push_to_hub: sends what is in --output_dir {folder}, and not {model}, which is looked at")
    if not args.do_train and not pushed_files(folder):
        raise InputError(f"--push_to_hub: --output_dir {folder} holds no model to send")
    try:
        name = create_repo(args.hub_model_id, private=args.hub_private_repo, exist_ok=True).repo_id
        auth_check(name, write=True)
        if args.hub_revision:
            create_branch(name, branch=args.hub_revision, exist_ok=True)
        public = args.hub_private_repo and not model_info(name).private
    except HUB_FAILURES as error:
        raise InputError(f"--push_to_hub: {push_reason(error)}") from error
    if public:
        raise InputError(f"--hub_private_repo: {name} is there already, and public")
    args.hub_model_id = name


def push(args: RunArguments, again: str = "--do_eval --push_to_hub of that folder sends it") -> None:
    """With `--push_to_hub`, send the output folder's model with its card and figures, in one commit, and `args.json`
    without what is private to this machine. Raises InputError where the hub does not take it, with what to do `again`;
    the folder stays as it is."""
    if not args.push_to_hub or args.process_index != 0:
        return
    folder = Path(args.output_dir)
    name_in_card(folder, args.hub_model_id)
    files = {name: CommitOperationAdd(name, folder / name) for name in pushed_files(folder)}
    if "args.json" in files:
        text = json.dumps(run_for_others(read_json(folder / "args.json")), indent=2) + "\n"
        files["args.json"] = CommitOperationAdd("args.json", text.encode())
    try:
        sent = create_commit(
            args.hub_model_id, files.values(), commit_message="A finished run", revision=args.hub_revision
        )
    except HUB_FAILURES as error:
        raise InputError(f"--push_to_hub: {push_reason(error)}; the model is in {folder}, and {again}") from error
    print(f"sent to {sent.commit_url}")
