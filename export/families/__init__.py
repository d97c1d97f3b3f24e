"""One file a checkpoint family: prefixes, renames, prompts, token ids."""
