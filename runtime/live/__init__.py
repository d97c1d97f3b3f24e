"""Holds a conversation in real time: listens while it speaks."""
