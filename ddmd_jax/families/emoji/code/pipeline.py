"""Text to scenes of emoji in a few unguided steps: a student of ddmd_jax (Apache-2.0)."""

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image


class EmojiPipeline(DiffusionPipeline):
    """`steps` is what the student was trained for, `time_scale` what its network counts time in."""

    def __init__(self, transformer, vae, text_encoder, tokenizer, scheduler, steps=4,
                 time_scale=100.0):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder,
                              tokenizer=tokenizer, scheduler=scheduler)
        self.register_to_config(steps=steps, time_scale=time_scale)

    def encode_prompt(self, prompts):
        """(states ``[B, L, D]``, mask ``[B, L]`` bool); an empty prompt is the null prompt."""
        found = self.tokenizer(list(prompts), padding='max_length', truncation=True,
                               max_length=self.text_encoder.config.max_length, return_tensors='pt')
        ids = found['input_ids'].to(self.device)
        mask = found['attention_mask'].to(self.device, torch.bool)
        return self.text_encoder(ids, mask), mask

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=None, generator=None, latents=None,
                 output_type='pil', return_dict=True):
        """`latents` are noise ``[B, 8, 16, 16]``; `output_type` is pil, np or latent."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        states, mask = self.encode_prompt(prompts)
        network, dtype = self.transformer.config, self.transformer.dtype
        shape = (len(prompts), network.in_channels, network.sample_size, network.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self.device, dtype=dtype)
        x = latents.to(self.device, dtype)
        n = num_inference_steps or self.config.steps
        self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n, n), device=self.device)
        for t in self.scheduler.timesteps:
            clean = 1 - t / self.scheduler.config.num_train_timesteps  # 0 is noise, 1 a picture
            time = (self.config.time_scale * clean).expand(len(prompts)).to(dtype)
            velocity = self.transformer(x, time, states, mask, return_dict=False)[0]
            # Its scheduler goes along sigma, from 1 to 0.
            x = self.scheduler.step(-velocity, t, x, generator=generator, return_dict=False)[0]
        if output_type != 'latent':
            codec = self.vae.config
            x = self.vae.decode(x / codec.scaling_factor + codec.shift_factor).sample
            x = (x.float().clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy()
        if output_type == 'pil':
            x = [Image.fromarray(np.round(255 * image).astype(np.uint8)) for image in x]
        return ImagePipelineOutput(images=x) if return_dict else (x,)
