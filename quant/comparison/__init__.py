"""What a smaller bundle loses against its reference: tensors, distributions, answers, speech, and what it saves."""
