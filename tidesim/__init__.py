"""Plan expert offloading for mixture-of-experts diffusion LLMs on paper, and prove it on the machine."""
