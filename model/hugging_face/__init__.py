"""Models in Hugging Face's folders, both ways: DeepSeek V3 and V2, Llama, Qwen 2 and 3."""
