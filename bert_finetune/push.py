"""A finished run's folder, sent to the Hugging Face hub at the very end of its script."""

from pathlib import Path

from huggingface_hub import auth_check, create_branch, create_repo, upload_folder

from bert_finetune.arguments import RunArguments
from bert_finetune.errors import InputError
from bert_finetune.hub import push_reason
from bert_finetune.outputs import PUSHED_FILES


def open_repository(args: RunArguments) -> None:
    """With `--push_to_hub`, make sure that the model can be sent, before anything else is done: its repository and
    branch exist, made where they did not, and the token may write there. Raises InputError where it cannot."""
    if not args.push_to_hub or args.process_index != 0:
        return
    try:
        name = create_repo(args.hub_model_id, private=args.hub_private_repo, exist_ok=True).repo_id
        auth_check(name, write=True)
        if args.hub_revision:
            create_branch(name, branch=args.hub_revision, exist_ok=True)
    except Exception as error:
        raise InputError(f"--push_to_hub: {push_reason(error)}") from None
    args.hub_model_id = name


def push(args: RunArguments) -> None:
    """With `--push_to_hub`, send the output folder's model with its card, figures and log, in one commit.

    Raises InputError where the folder holds no model or the hub does not take it; the folder stays as it is.
    """
    folder = Path(args.output_dir)
    if not args.push_to_hub or args.process_index != 0:
        return
    if next(folder.glob("model*.safetensors"), None) is None:
        raise InputError(f"--push_to_hub: --output_dir {folder} holds no model to send")
    try:
        sent = upload_folder(
            repo_id=args.hub_model_id,
            folder_path=folder,
            allow_patterns=PUSHED_FILES,
            revision=args.hub_revision,
            commit_message="A finished run",
        )
    except Exception as error:
        again = f"the model is in {folder}, and --do_eval --push_to_hub sends it"
        raise InputError(f"--push_to_hub: {push_reason(error)}; {again}") from None
    print(f"sent to {sent.commit_url}")
