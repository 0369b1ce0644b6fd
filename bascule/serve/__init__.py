"""The finished model behind OpenAI's API and a chat page, on the chip whose verdict says `infer`."""
