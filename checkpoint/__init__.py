"""What a Hugging Face model folder says, read without torch and the same for everyone who asks."""
