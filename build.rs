//! Unpacks the two files of Swagger UI that the page at /docs needs, so that they become part of the program.

use std::error::Error;
use std::io::{Cursor, copy};
use std::path::Path;
use std::{env, fs::File};

use utoipa_swagger_ui_vendored::SWAGGER_UI_VENDORED;
use zip::ZipArchive;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=sql");
    let out = env::var("OUT_DIR")?;
    let mut archive = ZipArchive::new(Cursor::new(SWAGGER_UI_VENDORED))?;
    for index in 0..archive.len() {
        let mut file = archive.by_index(index)?;
        for name in ["swagger-ui.css", "swagger-ui-bundle.js"] {
            if file.name()?.ends_with(&format!("/dist/{name}")) {
                copy(&mut file, &mut File::create(Path::new(&out).join(name))?)?;
            }
        }
    }
    Ok(())
}
