//! What the built-in recipes draw is part of every run's identity: pinned by SHA-256.

use detco::config::{Config, RECIPES};
use detco_shards::views::{SamplePlan, ViewPlan};
use sha2::{Digest, Sha256};

fn add_view(digest: &mut Sha256, view: &ViewPlan) {
    let crop = view.crop;
    for number in [view.size, crop.left, crop.top, crop.width, crop.height] {
        digest.update(number.to_le_bytes());
    }
    for op in &view.ops {
        digest.update(serde_json::to_string(op).unwrap());
    }
    digest.update([u8::from(view.flip)]);
}

fn add_plan(digest: &mut Sha256, plan: &SamplePlan) {
    for view in &plan.views {
        add_view(digest, view);
        let Some(grid) = &view.grid else { continue };
        digest.update(grid.patch.to_le_bytes());
        for offset in grid.offsets.iter().flatten() {
            digest.update(offset.to_le_bytes());
        }
        digest.update(&grid.order);
    }
}

#[test]
fn every_recipe_draws_the_same_numbers_for_ever() {
    let names: Vec<&str> = RECIPES.iter().map(|(name, ..)| *name).collect();
    let pinned: Vec<&str> = DRAWN.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, pinned);
    let mut faults = Vec::new();
    for (name, expected) in DRAWN {
        let config = Config::load(name, &[]).unwrap();
        let recipe = config.training_views();
        let mut digest = Sha256::new();
        for sample in 0..1000 {
            add_plan(&mut digest, &recipe.draw(500, 375, config.seed, 3, sample));
        }
        let found: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if found != expected {
            faults.push(format!("{name}: {found}"));
        }
    }
    assert!(faults.is_empty(), "drawn otherwise:\n{}", faults.join("\n"));
}

const DRAWN: [(&str, &str); 23] = [
    ("detco-r50", "025e68aae9e39971f9012dbb1a24cd112df943c9effa6840f3fd0f15517d38a2"),
    ("detco-aa-r50", "f6147f88c995e2a5c92b718d6b96f6698f9366b6540520e08db273046cc5b24c"),
    ("moco-v2-r50", "15e85c8df80de0f7171741535141157a857ec17fb655685e4f33ddc3b80210cd"),
    ("moco-v1-r50", "b895b925f1fa9fecc6a3eccc311a358f7b5b2c34b3ed41f8b56be6df8da5d43f"),
    ("densecl-r50", "15e85c8df80de0f7171741535141157a857ec17fb655685e4f33ddc3b80210cd"),
    ("simclr-r50", "df2dec584e21207469e90bedd7084eea85db81de9fa7361ac7e78f14592265a8"),
    ("byol-r50", "97fd6d534840af6413d6d28e3f3d20f21d6581c1f3fceca8492cd3cb5999f332"),
    ("swav-r50", "3121105e56e47ece719dfa34c5475a2c1a51c8f364c0c7d4b49483248dcdb012"),
    ("rotation-r50", "de08cbaf7a44410e190bc84ff4a1d38e603a679accc98bfd7201ec75f2bda950"),
    ("jigsaw-r50", "e3c9dc53b6fc892e2f83f5976d5c17beb18246e50429730753528570872477ba"),
    ("detco-cifar", "8a2d901e27eebb0a603953b41525c46094608db67ef4ba8e9906085b1262bc4c"),
    ("moco-v2-cifar", "c134667f61f91436b087a9d8df699617fb2404e5c1cf94b37e7b406443b7dd5d"),
    ("densecl-cifar", "c134667f61f91436b087a9d8df699617fb2404e5c1cf94b37e7b406443b7dd5d"),
    ("simclr-cifar", "e52f382388ac3347f1e96f1884eea0fae4c5892aa9349848a6997b4f6de1d3e2"),
    ("byol-cifar", "e52f382388ac3347f1e96f1884eea0fae4c5892aa9349848a6997b4f6de1d3e2"),
    ("swav-cifar", "f32889e8fc5e26676c7fbbbba7c51bf694da14f7d947c57f3cf47ca975105f13"),
    ("rotation-cifar", "7817a92d0188f42b763aa3d29bc4167a091a776de9749443eb7370be1b59085a"),
    ("jigsaw-cifar", "7fe550504ddeb9c9e34fe748313973c77d794f1ab6272afbd7a76396ad7b7724"),
    ("detco-small", "f519a66a19f4255f8ada3b28f75bdccab777e68e48bc3aeedb3608b014b2338b"),
    ("moco-v2-small", "cb5c3974286ae0d190eb25d1535a5db931757d4339decc795ec5f618342ba980"),
    ("densecl-small", "cb5c3974286ae0d190eb25d1535a5db931757d4339decc795ec5f618342ba980"),
    ("byol-small", "9f101a15be03fc978d90c1b536e6e367b378b1729962b50aa89a27d9887b9d5a"),
    ("swav-small", "2089a81b84fc561d782473a92728570895fd7aa8626230068b6f9b4f10ffb166"),
];
