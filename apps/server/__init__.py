"""The bundle behind the interface that other programs speak: HTTP as the OpenAI API has it."""
