"""OpenAI's protocol: requests, tokenization, responses, errors."""
