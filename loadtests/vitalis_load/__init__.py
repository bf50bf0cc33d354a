"""Load tests of whatever speaks OpenAI's or Anthropic's API: what was asked, what came, and how far it can be believed."""
