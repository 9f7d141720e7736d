//! Checks each response of the service against `src/api/openapi.yaml`.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

use jsonschema::Validator;
use serde_json::{Value, json};

use super::Response;

pub const OPENAPI_YAML: &str = include_str!("../../src/api/openapi.yaml");

pub static OPENAPI: LazyLock<Value> =
    LazyLock::new(|| serde_yaml_ng::from_str(OPENAPI_YAML).expect("openapi.yaml is YAML"));

/// Asserts that the document allows this response to a request.
pub fn assert_documented(response: &Response, method: &str, path: &str) {
    let id = response.header("x-request-id").expect("a request id");
    assert!((1..=64).contains(&id.len()), "{id}");
    if [204, 302, 304].contains(&response.status) {
        assert!(response.body.is_empty());
        return;
    }
    if method == "HEAD" || method == "OPTIONS" {
        return;
    }
    let content_type = response.header("content-type").expect("a content type");
    let media_type = content_type.split(';').next().expect("a media type");
    if response.status >= 400 {
        assert_eq!(media_type, "application/json");
        assert_eq!(response.header("cache-control"), Some("no-store"));
        let (_, message) = response.error();
        assert!(
            !message.ends_with('.') && message != message.to_uppercase(),
            "{message}"
        );
    }
    let schema = &documented(method, path, response.status)["content"][media_type]["schema"];
    assert!(
        schema.is_object(),
        "openapi.yaml has no {media_type} for {method} {path} {}",
        response.status
    );
    if media_type == "application/json" {
        let body = response.json();
        let validator = validator(schema);
        let problems: Vec<_> = validator
            .iter_errors(&body)
            .map(|error| error.to_string())
            .collect();
        assert!(
            problems.is_empty(),
            "{method} {path}: {problems:?} in {response:?}"
        );
    }
}

/// The validator of a schema. Each is built once.
pub fn validator(schema: &Value) -> Arc<Validator> {
    static BUILT: LazyLock<Mutex<HashMap<String, Arc<Validator>>>> = LazyLock::new(Mutex::default);
    let mut built = BUILT.lock().expect("lock");
    let validator = built.entry(schema.to_string()).or_insert_with(|| {
        // References in a schema point into the whole document.
        let schema = json!({ "allOf": [schema], "components": OPENAPI["components"] });
        Arc::new(jsonschema::validator_for(&schema).expect("a valid schema"))
    });
    validator.clone()
}

/// The description of a response, or that of an error if the document does not know the path or the method.
fn documented(method: &str, path: &str, status: u16) -> &'static Value {
    let path = path.split('?').next().expect("a path");
    let matches = |template: &str| {
        let (template, path): (Vec<_>, Vec<_>) =
            (template.split('/').collect(), path.split('/').collect());
        template.len() == path.len()
            && template.iter().zip(&path).all(|(template, part)| {
                template == part || template.starts_with('{') && !part.is_empty()
            })
    };
    let paths = OPENAPI["paths"].as_object().expect("paths");
    let operation = paths
        .iter()
        .find(|(template, _)| matches(template))
        .and_then(|(_, operations)| operations.get(method.to_ascii_lowercase()));
    let Some(operation) = operation else {
        return &OPENAPI["components"]["responses"]["OtherError"];
    };
    let responses = &operation["responses"];
    let response = responses.get(status.to_string());
    let response = response.unwrap_or(&responses["default"]);
    match response["$ref"].as_str() {
        Some(reference) => OPENAPI
            .pointer(reference.trim_start_matches('#'))
            .expect("the reference points to a response"),
        None => response,
    }
}
