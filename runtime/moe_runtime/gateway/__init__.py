"""The front door: the OpenAI face, and the replay of a request on another rank when its rank dies."""
