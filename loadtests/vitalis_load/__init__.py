"""Load tests of whatever speaks OpenAI's or Anthropic's API: what was asked, what came, how far to believe it."""
