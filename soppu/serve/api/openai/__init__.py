"""OpenAI's routes: completions, chat completions and the list of models, for its clients as they are."""
